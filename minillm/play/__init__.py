"""The page: guess the next word, pick the better response, and watch a model change by what was picked.

__main__.py    options; starts the server
app.py         the addresses of the page, and what each does
api.py         the same models by OpenAI's API, on the same port
web.py         who may ask; bodies, events and errors
worker.py      one thread computes for everybody, a token of each in turn
shelf.py       the runs there are, their models, and replies
words.py       a model's likeliest next words
parts.py       guessing words, picking responses
training.py    rlhf.py on the visitors' picks, by tools/stage.py in a process of its own
static/        the page itself: one HTML file, one style sheet, plain JavaScript
"""
