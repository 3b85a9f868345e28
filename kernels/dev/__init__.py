"""What those need who change a kernel: the compile gate, the benchmark and the peers it is held against."""
