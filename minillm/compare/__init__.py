"""The effect of alignment, made visible: the same prompts through several models, side by side.

    __main__.py    the command `python -m minillm.compare`: asks every model, writes compare.json and the page
    verdicts.py    who wins: by the rubric, a reward model, a judge model, or a person who does not see whose
    probes.py      what a model holds likely: harmful against helpful text, held-out text, KL, how sure it is
    findings.py    all of that as the plain content of compare.json
    sections.py    what of it is shown, in the words of sections.toml; plots.py draws
    page.py        the page: page.html.j2 in the style of page.css

Left out: several samples to a prompt, and several seeds of training (benchmarks/policy.py has those).
"""
