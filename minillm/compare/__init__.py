"""The effect of alignment, made visible: the same prompts through several models, side by side.

    __main__.py    the command `python -m minillm.compare`: asks every model, writes compare.json and the page
    metrics.py     all that is measured, as sections of tables with the words of words.toml
    page.py        the same sections in the terminal, and on the page that page.html.j2 writes in the style of
                   page.css

Who wins is for the judges of minillm/tools/judge.py to say. Left out: several samples to a prompt, and
several seeds of training (benchmarks/policy.py has those).
"""
