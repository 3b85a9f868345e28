"""Other people's records: read whole, or left out with a reason that names what was not understood."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minillm.io.formats import read_record
from minillm.preferences import ranking_by


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ASKED, EARLIER = chat("Why?", "Because."), chat("Hi", "Hello")
USER, BOT = ASKED
SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
TOOL = {"role": "tool", "content": "42"}
ADD = {"name": "add", "arguments": '{"to": 2}'}
ADDS = [{"id": "1", "type": "function", "function": ADD}]
CALLED = {"role": "assistant", "content": "", "tool_calls": ADDS}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: Yes",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: No"}  # fmt: skip


def turns(*pairs: tuple[str, object], **fields: object) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **fields}


def node(text, role="assistant", rank=None, replies=()) -> dict:
    return {"text": text, "role": role, "rank": rank, "replies": list(replies)}


CONVERSATIONS = [
    # the roles and contents of chats
    (turns(("developer", "Be kind."), ("user", "Why?"), ("model", "Because.")), [SYSTEM, *ASKED]),
    (turns(("user", [{"type": "text", "text": "Why?"}]), ("assistant", ["Because."])), ASKED),
    ({"messages": [{"from": "human", "value": "Why?"}, {"from": "chatgpt", "value": "Because."}]}, ASKED),
    ({"contents": [{"role": "user", "parts": [{"text": "Why?"}]}, {"role": "model", "parts": "Because."}],
      "systemInstruction": {"parts": [{"text": "Be kind."}]}}, [SYSTEM, *ASKED]),
    ({"conversations": ASKED}, ASKED),
    ({"conversation": [{"input": "Why?", "output": "Because."}]}, ASKED),
    ({"conversation": [{"human": "Why?", "assistant": "Because."}]}, ASKED),
    (ASKED, ASKED),
    ({"id": 1, "data": ["Why?", "Because."]}, ASKED),
    ({"conversations": ["Why?", "Because."], "source": "lima"}, ASKED),
    ({"messages": [USER, {**BOT, "weight": 1, "tool_calls": None}]}, ASKED),
    ({"messages": [USER, {"role": "assistant", "content": None, "refusal": "Because."}]}, ASKED),
    ({"messages": [USER, {**BOT, "reasoning_content": "hm"}]},
     chat("Why?", "<think>\nhm\n</think>\n\nBecause.")),
    ({"messages": [EARLIER[0], {**EARLIER[1], "weight": 0}, *ASKED]},
     [EARLIER[0], {**EARLIER[1], "train": False}, *ASKED]),
    ({"messages": ASKED, "prompt": "Why?", "prompt_id": "7"}, ASKED),
    ({"messages": ASKED, "label": {"ability": ["reasoning"]}}, ASKED),  # of what kind it is
    ({"messages": json.dumps(ASKED), "tools": "[]"}, ASKED),  # as tables hold lists
    ({"messages": [USER], "answer": "Because."}, ASKED),
    ({"problem": "Why?", "solution": "Yes", "generations": ["a", "b"], "messages": ASKED}, ASKED),
    ({"problem": "Why?", "solution": "Yes", "answer": "4", "messages": ASKED}, ASKED),
    *(({**record, "reasoning": switch}, ASKED) for switch in ("on", "off") for record in
      ({"input": "Why?", "output": "Because."}, {"messages": ASKED})),
    ({"messages": ASKED, "chat_template_kwargs": {"custom_instructions": "Be kind.", "enable_thinking": 0}},
     [SYSTEM, *ASKED]),
    # calls of tools and their results
    ({"messages": [USER, CALLED, TOOL, BOT]}, [USER, CALLED, TOOL, BOT]),
    ({"messages": [USER, {**CALLED, "content": None}, {**TOOL, "tool_call_id": "1"}, BOT, *ASKED]},
     [USER, CALLED, {**TOOL, "tool_call_id": "1"}, BOT, *ASKED]),
    ({"messages": [USER, {"role": "assistant", "tool_calls": ADDS}]}, [USER, CALLED]),
    ({"messages": [USER, {"role": "assistant", "function_call": ADD}, {**TOOL, "role": "function"}, BOT]},
     [USER, {**CALLED, "tool_calls": [{**ADDS[0], "id": "call_0"}]}, TOOL, BOT]),
    ({"messages": [USER, CALLED, {**TOOL, "content": ""}, BOT]},
     [USER, CALLED, {**TOOL, "content": ""}, BOT]),
    *(({"messages": [*system, *ASKED], "tools": given},
       [{"role": "system", "content": f'{head}Tools:\n{{"name": "add"}}'}, *ASKED])
      for system, head in (([], ""), ([SYSTEM], "Be kind.\n\n"))
      for given in ([{"name": "add"}], '[{"name": "add"}]', ['{"name": "add"}'])),
    # what stands beside the turns
    ({"system": "Be kind.", "messages": ASKED}, [SYSTEM, *ASKED]),
    ({"system": None, "tools": [], "messages": ASKED}, ASKED),
    ({"messages": [{"role": "system", "content": ""}, *ASKED]}, ASKED),
    ({"system_prompt": "Be kind.", "question": "Why?", "response": "Because."}, [SYSTEM, *ASKED]),
    ({"instruction": "Why?", "output": "Because.", "system": "Be kind.", "history": [["Hi", "Hello"]]},
     [SYSTEM, *EARLIER, *ASKED]),
    # a question and an answer
    *(({question: "Why?", answer: "Because."}, ASKED) for question, answer in (
        ("prompt", "completion"), ("prompt", "response"), ("instruction", "response"), ("query", "response"),
        ("input", "output"), ("question", "answer"), ("inputs", "targets"), ("problem", "solution"),
        ("Question", "Answer"), ("context", "continuation"), ("instruction", "output"),
        ("instruction", "generation"))),
    ({"problem": "Why?", "solution": "Because.", "answer": "cause"}, ASKED),
    ({"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"}, ASKED),
    ({"context": "Why?", "chain_of_thought": "hm", "answer": "Because."}, ASKED),
    ({"context": "A cat sat.", "question": "Who?", "answer": "It."}, chat("A cat sat.\n\nWho?", "It.")),
    ({"instruction": "Add.", "input": "1 1", "output": "2"}, chat("Add.\n\n1 1", "2")),
    ({"instruction": "Why?", "output": "Because.", "prompt": "### Instruction:\nWhy?\n### Output:\nBecause."},
     ASKED),
    ({"question": "Why?", "answer": ["Because."]}, ASKED),
    ({"prompt": [USER], "completion": [BOT]}, ASKED),
    ({"prompt": [USER], "completion": [BOT], "label": True}, ASKED),
    ({"prompt": "Why?", "completion": "Because.", "label": "True"}, ASKED),
    # the white space of a completion is kept, but for the one space that joins it
    ({"prompt": "Why?", "completion": " Because."}, ASKED),
    *(({question: "def f(x):\n", answer: text}, chat("def f(x):\n", text))
      for question, answer in (("prompt", "completion"), ("instruction", "output"))
      for text in ("    y = x\n    return y\n", "\n\nx", "x \n")),
    # transcripts
    ({"text": "### Human: Why?### Assistant: Because."}, ASKED),
    ({"text": "\n\nHuman: Why?\n\nAssistant:Because."}, ASKED),
    ({"transcript": "Human: Why?\n\nAssistant: Because."}, ASKED),
    ({"dialogue": "Human: Why?\n\nAssistant: Because."}, ASKED),
    ({"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "system": "Be kind."}, [SYSTEM, *ASKED]),
    ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "response": " Because."}, ASKED),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant:  c\n\nHuman: d\n\nAssistant: e"},
     chat("a", "b\n\nc", "d", "e")),  # a speaker who goes on
    *(({"text": f"{who}: Why?\nAssistant: Because.\n"}, ASKED) for who in ("Human", "\nUser")),
    ({"text": "Human: Why?\n\nAssistant: Because\nHuman: no."}, chat("Why?", "Because\nHuman: no.")),
    ({"text": "### Human: Why?\nUser: me### Assistant: Because."}, chat("Why?\nUser: me", "Because.")),
    # of a preference, what is preferred
    ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, ASKED),
    ({"instruction": "Why?", "output": "x", "chosen": "Because.", "rejected": "x"}, ASKED),
    ({"prompt": "", "chosen": ASKED, "rejected": chat("Why?", "No.")}, ASKED),
    ({"conversations": [*EARLIER, USER], "chosen": {"from": "gpt", "value": "Because."}, "rejected": BOT},
     [*EARLIER, *ASKED]),
    ({"input": "Why?", "output_1": "No.", "output_2": "Because.", "label": 2}, ASKED),
    ({"prompt": "Why?", "completions": [{"text": "No", "rating": 1}, {"text": "Because.", "rating": 5}]},
     ASKED),
    ({"prompt": node("Why?", "prompter", replies=[node("No"), node("Because.", rank=0)])}, ASKED),
    ({"prompt": node("Why?", "prompter", replies=[
        node("a", rank=0) | {"deleted": True}, node("b", rank=1) | {"review_result": False},
        node("Because.", rank=2)])}, ASKED),
    ({"instruction": "Why?", "input": "<noinput>", "output": "Because."}, ASKED),
    # what cannot be learned
    ({"messages": [*ASKED, *chat("Thanks.")]}, ASKED),
    ({"messages": [*ASKED, *chat("So?", "")]}, ASKED),
    ({"messages": [*ASKED, USER, CALL, TOOL, BOT]}, ASKED),
    ({"messages": [*ASKED, USER, TOOL, BOT]}, ASKED),  # a result of no call
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), CONVERSATIONS)
def test_a_record_is_the_conversation_it_says(record, expected):
    assert next(read_record(record, "conversation")) == expected


def test_a_task_of_several_instances_is_as_many_conversations_each_with_its_input():
    instances = [{"input": "1", "output": "a"}, {"input": "", "output": "b"}, {"output": "c"}]
    found = list(read_record({"instruction": "Do", "instances": instances}, "conversation"))
    assert found == [chat("Do\n\n1", "a"), chat("Do", "b"), chat("Do", "c")]


PROMPTS = [
    ({"prompt": "Why?"}, [USER]),
    ({"prompt": [USER]}, [USER]),
    ({"messages": [*EARLIER, USER]}, [*EARLIER, USER]),
    ({"messages": [*EARLIER, *ASKED]}, [*EARLIER, USER]),
    ({"instruction": "Why?", "input": ""}, [USER]),
    ({"question": "Why?", "answer": "Because."}, [USER]),
    ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, [USER]),
    ([USER], [USER]),
    # whichever reply is right
    ({"problem": "Why?", "solution": "So.", "answer": "4"}, [USER]),
    ({"question": "Why?", "responses": [{"response": "Because."}]}, [USER]),
]


@pytest.mark.parametrize(("record", "expected"), PROMPTS)
def test_a_prompt_is_all_that_is_asked_and_no_earlier_question(record, expected):
    assert list(read_record(record, "prompt")) == [expected]


PAIR, TWO = {"prompt": "Why?", "chosen": "b", "rejected": "a"}, {"response_a": "a", "response_b": "b"}
RANKINGS = [
    (PAIR, "b > a"),
    ({"chosen": chat("Why?", "b"), "rejected": chat("Why?", "a")}, "b > a"),
    ({"prompt": "Why?", "chosen": chat("Why?", "b"), "rejected": chat("Why?", "a"), "score_rejected": 2.0,
      "messages": chat("Why?", "b"), "score_chosen": 9.0}, "b > a"),
    ({"prompt": [USER], "chosen": chat("", "b")[1:], "rejected": chat("", "a")[1:]}, "b > a"),
    ({"input": {"messages": [USER], "tools": []}, "preferred_output": chat("", "b")[1:],
      "non_preferred_output": chat("", "a")[1:]}, "b > a"),
    ({**PAIR, "chosen-rating": 3, "rejected-rating": 3}, "b = a"),
    *(({**PAIR, "rating": rating}, spelled) for rating, spelled in (([9, 9], "b = a"), ([1, 9], "b > a"))),
    ({"instruction": "Add.", "input": "1", "output": "x", "chosen": "b", "rejected": "a"}, "b > a"),
    ({"instruction": "Why?", "input": "", "output_1": "a", "output_2": "b", "preference": 2}, "b > a"),
    ({"input": "Why?", "output_1": "a", "output_2": "b", "label": 1}, "a > b"),
    *(({"input": "Why?", "output_1": "a", "output_2": "b", "label": two}, "b > a") for two in (2.0, "2.0")),
    ({"prompt": "Why?", **TWO, "winner": "B"}, "b > a"),
    *(({"question": "Why?", "response_A": "a", "response_B": "b", "label": order}, said)
      for order, said in (("B>A", "b > a"), ("[[A>>B]]", "a > b"), ("A=B", "a = b"))),
    ({"prompt": "Why?", "chosen": ["b", "c"], "rejected": ["a", "d"]}, "b = c > a = d"),
    ({"question": "Why?", "response_j": "b", "response_k": "a"}, "b > a"),
    *(({**PAIR, "chosen_score": none, "rejected_score": none}, "b > a") for none in ("", float("nan"))),
    *(({"prompt": "Why?", **TWO, "winner": word}, "a = b")
      for word in ("tie", "both_bad", "tie (bothbad)", "neither", "equal")),
    ({"conversation_a": chat("Why?", "a"), "conversation_b": chat("Why?", "b"), "winner": "model_b"},
     "b > a"),
    ({"prompt": "Why?", "response_0": "a", "response_1": "b", "better_response_id": 1}, "b > a"),
    ({"context": [USER], "response1": "a", "response2": "b", "overall_preference": 3}, "b > a"),
    ({"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": -2}, "a > b"),
    ({"question": "Why?", "answer_0": "a", "answer_1": "b", "score_0": -0.5, "score_1": "0.5"}, "b > a"),
    ({"question": {"full_text": "Why?"}, "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 2},
     "b > a"),
    ({"info": {"post": "Why?", "id": 1}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "b > a"),
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "scores": [1, 2.5, 1]}, "b > a = c"),
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "rank": [3, 1, 2]}, "b > c > a"),
    ({"messages": [USER], "responses": ["a", "b"], "ranking": [[1], [0]], "seed": 0}, "b > a"),
    ({"instruction": "Why?", "models": ["x"], "completions": [
        {"response": "a", "overall_score": 4}, {"response": "b", "overall_score": 7.5},
        {"response": "c", "overall_score": 4}]}, "b > a = c"),
    ({"instruction": "Why?", "completions": [{"response": text, "annotations": {
        "truth": {"Rating": rating}, "help": {"Rating": "3"}}} for text, rating in (("a", "N/A"), ("b", "5"))
      ]}, "b > a"),
    ({"prompt": "\n\nHuman: Why?\n\nAssistant: ", "turns": 2, "answers": [
        {"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]}, "b > a"),
    (HH, "Yes > No"),
    ({"prompt": node("Why?", "prompter", replies=[node("b", rank=2), node("a", rank=0), node("c", rank=2)])},
     "a > b = c"),
]  # fmt: skip


def spelled(ranking: tuple) -> str:
    replies, scores = zip(*ranking[1].items(), strict=True)
    return " > ".join(" = ".join(replies[i] for i in tied) for tied in ranking_by(scores))


@pytest.mark.parametrize(("record", "expected"), RANKINGS)
def test_a_record_is_the_ranking_it_says(record, expected):
    (ranking,) = read_record(record, "ranking")
    assert not isinstance(ranking, str), ranking
    asked = {"Add.": chat("Add.\n\n1")}.get(record.get("instruction"), [USER])
    assert spelled(ranking) == expected and ranking[0] == (
        [*EARLIER, *chat("And?")] if record is HH else asked
    )


def test_a_tree_gives_a_ranking_wherever_several_replies_to_a_message_have_a_rank():
    deep = [node("d1", rank=1), node("d0", rank=0), node("d none")]
    follow = node("And then?", "prompter", replies=deep)
    tree = node("Why?", "prompter", replies=[node("b", rank=2, replies=[follow]), node("a", rank=0)])
    first, second = read_record({"prompt": tree}, "ranking")
    assert (spelled(first), spelled(second)) == ("a > b", "d0 > d1")
    assert second[0] == [*chat("Why?", "b"), *chat("And then?")]


KTO = {"prompt": "Why?", "completion": "Because."}
LEFT_OUT = [
    ("conversation", {"messages": ASKED, "functions": [{"name": "search"}]}, "'functions'"),
    ("conversation", {"messages": ASKED, "tools": ["search"]}, "something else"),
    ("prompt", {"messages": [USER, CALLED, TOOL, BOT, USER]}, "tool call"),
    ("ranking", {"messages": [USER, CALLED, TOOL], "responses": ["a", "b"], "ranks": [1, 2]}, "tool call"),
    ("conversation", {"messages": ASKED, "prompt": "Who?"}, "'prompt'"),
    ("conversation", {"messages": ASKED, "images": ["a.png"]}, "'images'"),
    ("conversation", {"messages": ASKED, "documents": ["a"]}, "'documents'"),
    ("conversation", {"question": "Why?", "choices": ["Because.", "No."], "answer": "A"}, "'choices'"),
    ("conversation", {"messages": [SYSTEM, *ASKED], "system": "Be rude."}, "two system messages"),
    ("conversation", {"history": "Hi", "question": "Why?", "answer": "Because."}, "'history'"),
    ("conversation", {**KTO, "label": False}, "judged bad"),
    ("conversation", {**KTO, "label": "false"}, "judged bad"),
    *(("conversation", {"prompt": "Why?", **TWO, "winner": word}, "judged bad")
      for word in ("both_bad", "tie (bothbad)", "Neither")),
    ("conversation", {"messages": [USER, {"role": "assistant", "channel": "analysis", "content": "Hm."},
                                   {"role": "assistant", "channel": "final", "content": "So."}]}, "channel"),
    *(("conversation", {**KTO, judged: False}, "judged bad")
      for judged in ("is_safe", "is_response_safe", "is_correct", "verified", "passed")),
    ("conversation", {**KTO, "helpfulness": 0, "verbosity": 2}, "judged bad"),
    ("conversation", {**KTO, "label": "spam"}, "'label' that is no truth"),
    ("conversation", {**KTO, "weight": 0.5}, "'weight'"),
    ("conversation", {"messages": [USER, {**BOT, "weight": 0}]}, "weight 0"),
    *(("conversation", {"messages": [USER, {**BOT, name: 0}]}, "weight 0")
      for name in ("train", "training", "loss")),
    ("conversation", {"messages": [USER, {**BOT, "weight": 0.5}]}, "weight other"),
    *((purpose, record, words) for nan in ("NaN", float("nan")) for purpose, record, words in (
        ("conversation", {**KTO, "score": nan}, "judged bad"),
        ("ranking", {**KTO, "score": nan}, "nothing that compares it"),
        *(("ranking", {"prompt": "Why?", "responses": ["a", "b"], "scores": scores}, "no verdict")
          for scores in ([nan, nan], [nan, 1])),
        ("conversation", {"prompt": "Why?", **TWO, "overall_preference": nan}, "no verdict"))),
    *(("ranking", {"prompt": "Why?", "responses": ["a", "b"]} | odd, "no list")  # of keys, of letters
      for odd in ({"responses": {"gpt": "a", "llama": "b"}, "scores": [1, 2]}, {"scores": {"0": 5, "1": 2}},
                  {"responses": "ab", "scores": [1, 2]}, {"scores": "21"}, {"ranking": {"0": [1]}})),
    *((purpose, {"prompt": spelled(ASKED), "chosen": "b", "rejected": "a"}, "spelled as a text")
      for purpose in ("conversation", "prompt", "ranking") for spelled in (json.dumps, str)),
    ("conversation", {"messages": [USER, CALL, TOOL, BOT]}, "tool call"),  # of no function
    ("conversation", {"messages": [USER, BOT, TOOL, BOT]}, "tool call"),  # BOT is the call, as a text
    ("conversation", {"messages": [TOOL, USER, BOT]}, "tool call"),
    *(("conversation", {"instruction": f"What is it?\n{mark}", "output": "A cat."}, "placeholder")
      for mark in ("<image>", "<|image|>", "<image_1>", "<video>", "<extra_id_1>Assistant")),
    *(("conversation", {"question": "What is it?", "answer": "A cat.", name: "x"}, repr(name))
      for name in ("definition", "passage", "article", "table", "schema", "docs", "image_path")),
    ("conversation", {"contents": [{"role": "user", "parts": [{"text": "Why?"}]}, {"role": "model", "parts": [
        {"text": "Hm", "thought": True}, {"text": "Because."}]}]}, "not text"),
    ("conversation", {"prompt": "Why?", "response": "Because.", "output": "No."}, "'output' and 'response'"),
    ("conversation", {"messages": [{**USER, "value": "Who?"}, BOT]}, "'value' and 'content'"),
    ("conversation", {"messages": ASKED, "chat_template_kwargs": {"xml_tools": ["{}"]}}, "'xml_tools'"),
    ("conversation", {"question": "Why?", "answer": ["Because.", "So."]}, "something else"),
    *((purpose, {name: ["Why?", "And so?"]}, "something else")  # no reply among the questions
      for purpose in ("conversation", "prompt") for name in ("turns", "prompt")),
    ("conversation", {"input": "Why?", "targets": {"choices": ["a", "b"]}}, "'choices' in a message"),
    # in a message, a part of one or a reply, as beside them
    *((purpose, {"messages": [{**SYSTEM, **odd}, {**USER, **odd}, {**BOT, **odd}]}, "in a message")
      for purpose in ("conversation", "prompt") for odd in (
          {"functions": "f()"}, {"documents": ["a"]}, {"context": "a"}, {"label": False}, {"rating": 0},
          {"image": "a"}, {"masked": True}, {"train_detail": [{"train": False}]}, {"rejected": "No."})),
    ("conversation", turns(("user", [{"text": "Why?", "image": "a"}]), ("assistant", "a")), "'image'"),
    ("conversation", {"conversation": [{"input": "Why?", "output": "So.", "system": "a"}]}, "'system'"),
    *(("ranking", {"prompt": "Why?", "responses": [{"text": "a", "score": 1, **odd}, {"text": "b"}]}, "reply")
      for odd in ({"tool_calls": ADDS}, {"image": "a"}, {"reasoning_content": "Hm"})),
    # verdicts and scores of which one has it the other way round
    *(("ranking", {"prompt": "Why?", **TWO, "winner": "a", **other}, "contradict each other")
      for other in ({"score_a": 1, "score_b": 9}, {"preference_strength": 2})),
    ("ranking", {"prompt": "Why?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}],
                 "rank": [1, 2]}, "contradict each other"),
    ("conversation", {"Prompt": "Who?", **KTO}, "spelled in two ways"),
    *(("conversation", {"question": "Why?", "answer": "B", **given}, "which changes them")
      for given in ({"A": "x", "B": "y"}, {"opa": "x", "opb": "y"}, {"option1": "x", "option2": "y"})),
    ("prompt", {"messages": [USER], "document": "A cat sat.", "answers": ["It."]}, "'document'"),
    ("conversation", {**PAIR, "chosen_rating": 1, "rejected_rating": 2}, "contradict"),
    ("conversation", {**PAIR, "chosen": []}, "a message of the assistant's"),  # no lesson in "a"
    *(("ranking", {"question": "Why?", **replies, "label": order}, "names none of their replies")
      for replies, order in ((TWO, "A>B>C"), ({**TWO, "response_c": "c"}, "A=B"))),
    ("conversation", {"conversations": ASKED, "chosen": "Other.", "rejected": "No."}, "two replies"),
    ("conversation", {"question": "Why?", "answers": {"text": ["x"], "answer_start": [0]}}, "no list"),
    ("conversation", {"prompt": "Who?", "chosen": ASKED, "rejected": chat("Why?", "No.")}, "another prompt"),
    ("conversation", {"prompt": node("Why?", replies=[BOT]), "system": "Be kind."}, "'system'"),
    ("conversation", {"chosen": "Because.", "rejected": "No."}, "replies to nothing"),
    ("conversation", 5, "in no known format"),
    ("conversation", {}, "in no known format"),
    ("conversation", {"foo": 1, "instruction": "x"}, "without a message of the assistant's"),
    ("conversation", {"messages": []}, "without a message of the assistant's"),
    ("conversation", {"messages": [USER]}, "without a message of the assistant's"),
    ("conversation", {"messages": [3]}, "something else"),
    ("conversation", {"messages": [{"role": "user"}]}, "something else"),
    ("conversation", {"messages": 3}, "something else"),
    ("conversation", {"messages": "Hello"}, "something else"),  # and no conversation of letters
    ("conversation", {"history": [["Hi", "Hello"]], "instruction": "", "output": "x"}, "two replies"),
    ("conversation", {"instruction": 3, "input": "x", "output": "y"}, "something else"),
    ("conversation", {"prompt": {"text": "x", "replies": 3}}, "something else"),
    ("conversation", {"instruction": "a", "instances": []}, "that hold no conversation"),
    *(("conversation", {"text": text}, "without a conversation")
      for text in ("A play.\n\nHuman: Why?\n\nAssistant: Because.", "", "Humans: x")),
    ("conversation", turns(("user", "a"), ("assistant", " ")), "empty message"),
    ("conversation", turns(("user", ""), ("assistant", "a")), "empty message"),
    ("conversation", turns(("user", "a"), ("assistant", 3)), "not text"),
    ("conversation", turns(("user", [{"type": "image_url"}]), ("assistant", "a")), "not text"),
    ("conversation", turns(("user", "a"), ("narrator", "b"), ("assistant", "c")), "a role other"),
    ("conversation", turns(("user", "\ud800"), ("assistant", "a")), "surrogate"),
    ("prompt", {"system": "Be kind.", "messages": [BOT]}, "replies to nothing"),
    *((purpose, {"prompt": "Why?", "response_0": "a", "response_1": "b", "better_response_id": 1,
                 "safer_response_id": 0}, "'safer_response_id' and 'better_response_id'")
      for purpose in ("conversation", "ranking")),
    ("ranking", {"prompt": "Why?", **TWO, "winner": "c"}, "verdict that names none"),
    ("ranking", {"prompt": "Why?", **TWO, "label": 1}, "verdict that names none"),
    ("ranking", {"prompt": "Why?", **TWO}, "no verdict"),
    ("ranking", {"prompt": "Why?", "responses": ["a", "b"]}, "no verdict"),
    *(("ranking", {"prompt": "Why?", "responses": texts, "scores": scores}, "equal responses")
      for texts, scores in ((["a", "a", "b"], [1, 2, 3]), (["a", "a"], [1, 1]))),
    ("ranking", KTO, "one reply and nothing that compares it"),
    ("ranking", {"prompt": "Why?"}, "without a reply"),
    ("ranking", {"input": {"messages": [USER], "tools": [1]}, "preferred_output": [BOT],
                 "non_preferred_output": [BOT]}, "'tools'"),
    ("ranking", {**HH, "rejected": "\n\nHuman: Ho\n\nAssistant: No"}, "replies to different prompts"),
    ("ranking", {"chosen": "Assistant: Yes", "rejected": "Assistant: No"}, "replies to nothing"),
    ("ranking", {**HH, "rejected": HH["chosen"]}, "equal responses"),
    ("ranking", {**HH, "chosen": "\n\nHuman: Hi\n\nAssistant: "}, "empty message"),
    ("ranking", {"prompt": node("Why?", "prompter", replies=[node("a", rank=0)])}, "that hold no ranking"),
]  # fmt: skip


@pytest.mark.parametrize(("purpose", "record", "words"), LEFT_OUT)
def test_what_would_change_a_records_meaning_is_obeyed_or_the_record_is_left_out(purpose, record, words):
    (why,) = read_record(record, purpose)
    assert isinstance(why, str) and words in why, why


# ---- Laws

texts = st.text("ab :\nHA", min_size=1, max_size=8).map(str.strip).filter(bool)


@given(st.lists(texts, min_size=1, max_size=6), st.sampled_from(["\n\n", "", "\n"]))
@example(["Human: a", "Assistant: b"], "\n\n")  # a name inside a message opens none
def test_a_transcript_gives_back_its_messages(contents, before):
    names = {"user": "Human", "assistant": "Assistant"}
    text = "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in chat(*contents))
    (found,) = read_record({"chosen": before + text}, "conversation")
    assert found == (chat(*contents[: len(contents) // 2 * 2]) or "conversations without a message of the "
                     "assistant's")  # fmt: skip


nodes = st.recursive(
    st.just([]),
    lambda deeper: st.lists(st.tuples(st.none() | st.integers(0, 3), deeper), max_size=4),
    max_leaves=12,
)


def grow(children: list, depth: int = 0, name: str = "0", rank: int | None = None) -> dict:
    replies = [grow(below, depth + 1, f"{name}.{i}", rank) for i, (rank, below) in enumerate(children)]
    return node(name, ("prompter", "assistant")[depth % 2], rank, replies)


@given(nodes)
@example([(None, []), (1, []), (0, [(None, [])]), (0, [])])
def test_of_a_tree_every_reply_on_the_path_is_the_best_ranked_then_the_first(children):
    path, level = ["0"], children
    while level:
        ranks = [99 if rank is None else rank for rank, _ in level]
        best = ranks.index(min(ranks))
        path.append(f"{path[-1]}.{best}")
        level = level[best][1]
    (found,) = read_record({"prompt": grow(children)}, "conversation")
    if len(path) > 1:
        assert found == chat(*path[: len(path) // 2 * 2])  # ends with an assistant
    else:
        assert isinstance(found, str)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "user", "Why?", "1"]),
    lambda deeper: st.lists(deeper, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "text", "messages", "prompt", "input", "chosen",
                         "rejected", "completions", "label", "rank", "replies", "instances", "instruction",
                         "history", "system", "output_1", "output_2", "annotations", "ranking"]),
        deeper, max_size=4)),
    st.sampled_from(["conversation", "prompt", "ranking"]))  # fmt: skip
def test_no_record_whatever_its_fields_hold_is_more_than_left_out(record, purpose):
    for result in read_record(record, purpose):
        assert json.dumps(result)
