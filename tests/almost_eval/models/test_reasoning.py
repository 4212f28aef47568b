"""Thoughts told from answers: every case by hand."""

from __future__ import annotations

import time

import pytest

from almost_eval.models.reasoning import Reasoning, marker_tokens, opens_thought, split_reasoning

SPLIT = {
    # text: (answer, thought)
    "<think>\n2 + 2\n</think>\n\nFour.": ("Four.", "2 + 2"),
    "\n <think>2 + 2</think>Four.\n": ("Four.\n", "2 + 2"),
    "<thinking>2 + 2</thinking> Four.": ("Four.", "2 + 2"),
    "<thought>2 + 2</thought>Four.": ("Four.", "2 + 2"),
    "<reasoning>2 + 2</reasoning>Four.": ("Four.", "2 + 2"),
    "<seed:think>2 + 2</seed:think>Four.": ("Four.", "2 + 2"),
    "[THINK]2 + 2[/THINK]Four.": ("Four.", "2 + 2"),
    "◁think▷2 + 2◁/think▷Four.": ("Four.", "2 + 2"),
    "<|begin_of_thought|>2 + 2<|end_of_thought|>\n\nFour.": ("Four.", "2 + 2"),
    "<|START_THINKING|>2 + 2<|END_THINKING|>Four.": ("Four.", "2 + 2"),
    "<|channel>thought\n2 + 2<channel|>Four.": ("Four.", "thought\n2 + 2"),
    # case, attributes, spaces in the tag
    "<Think>2 + 2</THINK>Four.": ("Four.", "2 + 2"),
    '<think effort="high" n=2>2 + 2</think >Four.': ("Four.", "2 + 2"),
    # a tag closed by another's
    "<think>2 + 2</thinking>Four.": ("Four.", "2 + 2"),
    # nothing was thought
    "<think>\n\n</think>\n\nFour.": ("Four.", ""),
    "<think>2 + 2</think>": ("", "2 + 2"),
    # the closing tag alone
    "2 + 2\n</think>\n\nFour.": ("Four.", "2 + 2"),
    "2 + 2</think>Four.": ("Four.", "2 + 2"),
    "It is 2 + 2. </think> Four.": ("Four.", "It is 2 + 2."),
    "2 + 2\n[/THINK]\nFour.": ("Four.", "2 + 2"),
    "I shall use <think> tags.\n2 + 2\n</think>\nFour.": ("Four.", "I shall use <think> tags.\n2 + 2"),
    # several
    "<think>2</think>\n<think>+ 2</think>\nFour.": ("Four.", "2\n\n+ 2"),
    "<think>2</think>Wait.\n\n<think>\n+ 2\n</think>\n\nFour.": ("Wait.\n\nFour.", "2\n\n+ 2"),
    "Let me see.\n<think>\n2 + 2\n</think>\nFour.": ("Let me see.\n\nFour.", "2 + 2"),
    # nested, or the count does not come out
    "<think>2 <think>+</think> 2</think>Four.": ("Four.", "2 <think>+</think> 2"),
    "<think>I should use <think> tags</think>Four.": ("Four.", "I should use <think> tags"),
    "<think>2 + 2</think></think>Four.": ("Four.", "2 + 2"),
    "<think>2 + 2</think>Four.\n</think>": ("Four.", "2 + 2"),
    "<think>The tag `</think>` ends it. 2 + 2</think>Four.": ("Four.", "The tag `</think>` ends it. 2 + 2"),
    "<think>so it is 4 </think> and that is it": ("and that is it", "so it is 4"),
    "<think>```\n2 + 2\n</think>\nFour, `ok` ```x```": ("Four, `ok` ```x```", "```\n2 + 2"),
    # the answer shows tags
    "<think>2</think>Write:\n```xml\n<think>\nx\n</think>\n```\nDone.": (
        "Write:\n```xml\n<think>\nx\n</think>\n```\nDone.",
        "2",
    ),
    "<think>2</think>The tag <think> opens, and </think> closes.": ("The tag <think> opens, and </think> closes.", "2"),
    "<think>2</think>Close with `</think>`.": ("Close with `</think>`.", "2"),
    # channels
    "<|channel|>analysis<|message|>2 + 2<|end|><|start|>assistant<|channel|>final<|message|>Four.": ("Four.", "2 + 2"),
    "<|channel|>analysis<|message|>2 + 2<|end|><|channel|>final<|message|>Four.<|return|>": ("Four.", "2 + 2"),
    "<|start|>assistant<|channel|>analysis<|message|>2<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    "<|constrain|>json<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>Four.": ("Four.", "2\n\n{}"),
    "<|channel|>final<|message|>Four.<|return|>": ("Four.", None),
    "2 + 2<|end|><|start|>assistant<|channel|>final<|message|>Four.": ("Four.", "2 + 2"),
    "analysis2 + 2 is easy.assistantfinalFour.": ("Four.", "2 + 2 is easy."),
}

AS_IT_IS = [
    "",
    "\n\nFour. \n",
    "The model writes `<think>` first and `</think>` after it.",
    'It opens with "<think>" and ends with "</think>".',
    "Use <think> to begin and </think> to end.",
    "A thought ends with </think>.",
    "The tag </think> closes it.",
    "Write:\n\n<think>\n2 + 2\n</think>\nFour.",
    "Write this\n```\n<think>\n2 + 2\n</think>\nFour.\n```\nDone.",
    "Write this\n~~~~ text\n<think>\n2 + 2\n</think>\n~~~~\nDone.",
    "Write this\n```\n<think>\n2 + 2",  # a code block that was cut
    "<thin>a</thin> <think-tank>b</think-tank> <br> a < b > c",
    "In analysis, the assistant final is nothing.",
    "Analysis: four.",
    "The header is `<|channel|>final<|message|>`.",
]

CUT = {
    "<think>2 + 2": "2 + 2",
    "\n[THINK]\n2 + 2\n": "2 + 2",
    "<think>2 + <think>2": "2 + <think>2",
    "<think>I must write `</think>` then": "I must write `</think>` then",
    "<|channel|>analysis<|message|>2 + 2": "2 + 2",
    "<|channel|>analysis<|message|>2 + 2<|end|>": "2 + 2",
    "<|channel|>ana": "",
    "analysisWe add 2": "We add 2",
}


@pytest.mark.parametrize("text", SPLIT)
def test_thought_and_answer(text: str) -> None:
    answer, thought = SPLIT[text]
    assert split_reasoning(text) == Reasoning(answer, thought, False)


@pytest.mark.parametrize("text", AS_IT_IS)
def test_text_without_a_thought_is_left_byte_for_byte(text: str) -> None:
    assert split_reasoning(text) == Reasoning(text, None, False)


@pytest.mark.parametrize("text", CUT)
def test_thought_without_an_end(text: str) -> None:
    assert split_reasoning(text) == Reasoning("", CUT[text], True)


def test_thought_that_was_cut_after_half_an_answer() -> None:
    text = "<think>2</think>Wait.\n<think>\n+ 2"
    assert split_reasoning(text) == Reasoning("Wait.", "2\n\n+ 2", True)


def test_text_that_begins_inside_a_thought() -> None:
    # The prompt ended with the opening tag.
    assert split_reasoning("2 + 2\n</think>\n\nFour.", opened=True) == Reasoning("Four.", "2 + 2", False)
    assert split_reasoning("so it is </think> four.", opened=True) == Reasoning("four.", "so it is", False)
    assert split_reasoning("2 + 2, so four", opened=True) == Reasoning("", "2 + 2, so four", True)
    assert split_reasoning("</think>Four.", opened=True) == Reasoning("Four.", "", False)
    # Some models write the tag once more.
    assert split_reasoning("<think>\n2 + 2</think>Four.", opened=True) == Reasoning("Four.", "2 + 2", False)


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("[THINK]", True),
        ("<|start|>assistant<|channel|>analysis<|message|>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),  # thinking is off
        ("<|start|>assistant", False),
        ("Do you know the tag <think>?", False),
        ("", False),
    ],
)
def test_prompt_that_opens_a_thought(prompt: str, is_open: bool) -> None:
    assert opens_thought(prompt) is is_open


def test_long_text_takes_no_long_time() -> None:
    # 40,000 tags and 200,000 backticks: anything quadratic would take minutes.
    assert split_reasoning("<think>" * 20_000 + "</think>" * 20_000 + "Four.").answer == "Four."
    assert split_reasoning("`" * 200_000).thought is None


@pytest.mark.parametrize(
    "part",
    [
        "<think>a</think>x\n",
        "x\n<think>a</think>\n",
        "a</think>",
        "<think>a <think> b</think>x\n",
        "x `c`\n<think>a</think>\n```\nb\n```\n",
        "x `c`\n<think>a\n<think> b</think>\n",
        "like this:\n<think>a</think>\n",
        "the </think> tag ",
    ],
)
def test_many_thoughts_take_no_long_time(part: str) -> None:
    """20,000 thoughts: what looks at all tags for each thought takes minutes."""
    started = time.process_time()
    split_reasoning(part * 20_000)
    assert time.process_time() - started < (10 if "`c`" in part else 4)  # about 1 and 0.1 on a quiet machine


def test_each_thought_is_taken_from_what_is_left() -> None:
    """A fence inside a thought is not of the answer after it; one in the answer hides the tags in it."""
    text = "<think>a ``` b</think>One.\n<think>c</think>\n```\n<think>d</think>\n```\n<think>e</think>Two."
    assert split_reasoning(text) == Reasoning("One.\n\n```\n<think>d</think>\n```\n\nTwo.", "a ``` b\n\nc\n\ne", False)
    longer = "A\n````\n```\n<think>x</think>\n```\n````\n<think>y</think>\nB"
    assert split_reasoning(longer) == Reasoning("A\n````\n```\n<think>x</think>\n```\n````\n\nB", "y", False)


def test_special_tokens_that_mark_a_thought() -> None:
    assert marker_tokens(["<s>", "</s>", "[THINK]", "[/THINK]", "[INST]"]) == {"[THINK]", "[/THINK]"}
    assert marker_tokens(["<|end|>", "<|start|>", "<|user|>"]) == set()  # turns, and no channels
    channels = {"<|start|>", "<|channel|>", "<|message|>", "<|end|>"}
    assert marker_tokens([*channels, "<|endoftext|>"]) == channels


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<|begin_of_thought|>\nh\n<|end_of_thought|>\n\n<|begin_of_solution|>\nParis\n<|end_of_solution|>", "Paris"),
        ("<|begin_of_thought|>h<|end_of_thought|><|begin_of_solution|>Par", "Par"),  # cut
        ("<|START_THINKING|>h<|END_THINKING|><|START_RESPONSE|>Paris<|END_RESPONSE|>", "Paris"),
        ("Here is my thought process: h\n\nHere is my response: Paris", "Paris"),
        ("Here's my thought process:\nh\nHere's my response:\nParis\nand more", "Paris\nand more"),
        ("<think>h</think><answer>Paris</answer>", "<answer>Paris</answer>"),  # a prompt may have asked for it
    ],
)
def test_marks_around_an_answer_after_a_thought_are_no_part_of_it(text: str, answer: str) -> None:
    assert split_reasoning(text) == Reasoning(answer, "h", False)


@pytest.mark.parametrize(
    "text",
    [
        "<|begin_of_solution|>Paris<|end_of_solution|>",  # after no thought: the text as it is
        "He said: Here is my thought process: h\nHere is my response: Paris",
        "Here is my response: Paris",
        "Here is my thought process: start with 'Here is my response: ' and go on",
    ],
)
def test_such_marks_without_a_thought_are_the_answers(text: str) -> None:
    assert split_reasoning(text) == Reasoning(text, None, False)
