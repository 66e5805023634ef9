"""What people are shown is what is trained on: text, tokens and labels of a row, a step and the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from finetune.base import Base
from finetune.data.page import write_page
from finetune.data.prepare import PreparedData, read_data
from finetune.data.rows import Turn
from finetune.data.show import ShownRow, find_row, find_step
from finetune.data.show_text import row_text, step_text
from finetune.errors import UserError
from finetune.layout import cut_into_passes, lay_out_steps
from finetune.machine import Machine
from finetune.plan import TrainPlan, make_plan
from finetune.recipe import DataSection, Recipe
from tests.conftest import alpaca_rows

EMPTY, LONG = 3, 7  # rows of `mixed`
ODD = "a </script><b>bold</b> & <|eot_id|> </s>\rone\ttwo \u202eevil\u202c \x1b[31mred \U0001f469\u200d\U0001f467"
ARABIC = "\u0635\u0628\u0627\u062d \u0627\u0644\u062e\u064a\u0631"
CPU = Machine("cpu", "a CPU", 2, 64.0, 64.0, computes_bfloat16=True)


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Twenty rows, one without an answer, one of about a thousand tokens."""
    rows = [{**row, "output": f"answer {index}"} for index, row in enumerate(alpaca_rows(20))]
    rows[EMPTY]["output"] = " \n"
    rows[LONG]["output"] = "pear " * 1000
    return write(tmp_path / "mixed.jsonl", rows)


@pytest.fixture
def odd(tmp_path: Path) -> str:
    """Five rows, two of them with what HTML, a terminal or a tokenizer might take for more than text."""
    rows = [{"instruction": row["instruction"], "output": row["output"]} for row in alpaca_rows(5)]
    rows[1] = {"instruction": ODD, "output": f"said {ODD}"}
    rows[2] = {"instruction": ARABIC, "output": ARABIC}
    return write(tmp_path / "odd.jsonl", rows)


def read(base: Base, **section: object) -> PreparedData:
    return read_data(DataSection.model_validate(section), base, seed=17)


def plan_of(data: PreparedData, **train: object) -> TrainPlan:
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "name": "tiny",
            "model": {"base": data.base.facts.base},
            "data": data.section.model_dump(),
            "train": {"epochs": 2, **train},
        }
    )
    return make_plan(recipe, CPU, data.base.facts, data.facts).train


DROPPING = {"max_tokens": 200, "too_long": "drop", "empty_answer": "drop"}


# --- one row ---


def test_a_row_is_counted_as_it_was_read(pocket: Base, mixed: str) -> None:
    data = read(pocket, train=mixed, eval=0.5, **DROPPING)
    for number in set(range(20)) - {EMPTY, LONG}:
        shown = find_row(data, str(number)).to_json()
        assert shown["source"] == f"{mixed}:{number + 1}"
        assert shown["supervised_text"] == f"answer {number}</s>"
        assert shown == find_row(data, f"{mixed}:{number + 1}").to_json()


def test_every_row_says_where_it_goes(pocket: Base, mixed: str) -> None:
    data = read(pocket, train=mixed, eval=0.5, **DROPPING)
    for name, examples in {"train": data.train, "eval": data.eval}.items():
        assert {find_row(data, example.where).split for example in examples} == {name}


def test_a_row_of_the_other_split_or_of_none_is_told(pocket: Base, mixed: str) -> None:
    data = read(pocket, train=mixed, eval=0.5, **DROPPING)
    held, trained = data.eval[0].where, data.train[0].where
    for row, split, told in [
        (held, "train", f"--row: {held} is in the other split, eval; write --split eval"),
        (trained, "eval", f"--row: {trained} is in the other split, train; write --split train"),
        (str(EMPTY), None, f"--row: {mixed}:{EMPTY + 1} is dropped, empty_answer: "),
        (str(LONG), None, f"--row: {mixed}:{LONG + 1} is dropped, too_long: "),
        ("20", None, "--row: there is no row 20; rows are counted from 0 to 19"),
        ("x:1", None, "--row: there is no row x:1; "),
        ("-1", None, "--row: there is no row -1; "),
        ("0", "test", "--split: 'test' is not possible; write train or eval"),
    ]:
        with pytest.raises(UserError) as caught:
            find_row(data, row, split=split)
        assert str(caught.value).startswith(told)


def test_a_refused_row_is_told_and_the_others_are_shown(pocket: Base, mixed: str) -> None:
    data = read(pocket, train=mixed, max_tokens=200)
    assert find_row(data, "0").to_json()["supervised_text"] == "answer 0</s>"
    with pytest.raises(UserError, match="is refused, too_long") as caught:
        find_row(data, str(LONG))
    assert caught.value.answer == {"source": f"{mixed}:{LONG + 1}", "split": "refused", "reason": "too_long"}


def test_rows_of_an_evaluation_file_are_counted_on_their_own(pocket: Base, odd: str, mixed: str) -> None:
    data = read(pocket, train=odd, eval=mixed, **{**DROPPING, "max_tokens": 400})
    assert find_row(data, "4", split="eval").where == f"{mixed}:5"
    assert find_row(data, "4").where == f"{odd}:5"
    assert find_row(data, f"{mixed}:5").split == "eval"


def test_a_dropped_copy_is_shown_as_one(pocket: Base, tmp_path: Path) -> None:
    rows = alpaca_rows(4)
    said = {"instruction": "Say A.", "output": "A b"}
    file = write(tmp_path / "rows.jsonl", [said, *rows, {**said, "output": "a  B"}])
    assert find_row(read(pocket, train=file, deduplicate="near"), "5").split == "duplicate"
    assert find_row(read(pocket, train=file, deduplicate="exact"), "5").split == "train"
    other = write(tmp_path / "eval.jsonl", [{**said, "output": "a B"}, rows[0] | {"output": "new"}])
    data = read(pocket, train=file, eval=other, leaked="drop")
    assert [find_row(data, str(row), split=None if row == 0 else "eval").split for row in (0, 1)] == ["train", "eval"]
    assert find_row(data, f"{other}:1").split == "leaked"


@pytest.mark.parametrize("row", range(5))
def test_pieces_join_to_the_text_and_labels_to_the_answer(pocket: Base, odd: str, row: int) -> None:
    data = read(pocket, train=odd)
    shown = find_row(data, str(row)).to_json()
    said = json.loads(Path(odd).read_text().splitlines()[row])
    turns = [Turn("user", said["instruction"]), Turn("assistant", said["output"])]
    assert "".join(shown["pieces"]) == shown["text"] == data.template.text(turns, add_generation_prompt=False)
    learned = [piece for piece, label in zip(shown["pieces"], shown["labels"], strict=True) if label != -100]
    assert "".join(learned) == shown["supervised_text"] == f"{said['output']}</s>"
    stored = next(example for example in data.train if example.where == shown["source"])
    assert (shown["ids"], shown["labels"]) == (stored.ids.tolist(), stored.labels.tolist())
    # Decoded one by one, by the tokenizer itself.
    assert pocket.tokenizer.decode(shown["ids"], skip_special_tokens=False) == shown["text"]


def test_a_row_s_own_words_are_no_control_tokens(pocket: Base, odd: str) -> None:
    shown = find_row(read(pocket, train=odd), "1")
    controls = [i for i in range(shown.traced.example.tokens) if shown.is_control(i)]
    assert [shown.to_json()["pieces"][i] for i in controls] == ["<s>", "</s>"]
    literal = "".join(shown.to_json()["pieces"][i] for i in sorted(shown.literal_tokens))
    assert literal == "</s></s>"
    assert "'</s>' (2 times): the row's own text" in row_text(shown, colour=False)


@pytest.mark.parametrize(("loss_on", "learned"), [("assistant", [3, 5]), ("last-assistant", [5]), ("everything", None)])
def test_learned_turns_are_those_whose_words_are_learned(
    pocket: Base, tmp_path: Path, loss_on: str, learned: list[int] | None
) -> None:
    said = ["sys", "user-a", "answer-a", "user-b", "answer-b", "user-c", "answer-c"]
    roles = ["system", *["user", "assistant"] * 3]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    messages[2]["train"] = False
    file = write(tmp_path / "chat.jsonl", [{"messages": messages}])
    shown = find_row(read(pocket, train=file, loss_on=loss_on), "0")
    told = [turn["learned"] for turn in shown.turns()]
    text = shown.traced.supervised_text
    assert [turn["role"] for turn in shown.turns()] == roles
    assert told == [word in text for word in said]
    assert sum(told) == (6 if loss_on == "everything" else len(learned or []))


@pytest.mark.parametrize("side", ["prompt", "answer"])
def test_what_was_cut_is_marked(pocket: Base, tmp_path: Path, side: str) -> None:
    words = " ".join(f"w{number}" for number in range(120))
    file = write(tmp_path / "long.jsonl", [{"instruction": words, "output": words}])
    shown = find_row(read(pocket, train=file, max_tokens=600, too_long="truncate", truncate=side), "0")
    values = shown.to_json()
    kept = "".join(piece.text for piece in shown.pieces() if piece.token is not None)
    cut = "".join(piece.text for piece in shown.pieces() if piece.token is None)
    assert values["cut_tokens"] > 0
    assert len(values["pieces"]) == len(values["ids"]) <= 600
    assert "".join(values["pieces"]) == kept
    assert len(kept) + len(cut) == len(values["text"])
    assert cut.startswith("w0 w1") if side == "prompt" else cut.endswith("w119</s>")
    plain = row_text(shown, colour=False)
    assert "".join(re.findall("~~(.*?)~~", plain)) == cut
    assert f"\x1b[2;9m{cut}\x1b[0m" in row_text(shown, colour=True)


# --- as text ---


def test_learned_text_is_marked_for_people(pocket: Base, mixed: str) -> None:
    shown = find_row(read(pocket, train=mixed, **DROPPING), "2")
    plain = row_text(shown, colour=False)
    text = shown.traced.text
    assert plain.startswith(text.removesuffix("answer 2</s>") + "[[answer 2</s>]]\n\n")
    assert f"{mixed}:3: training row, format alpaca, template alpaca\n" in plain
    assert f"{len(shown.traced.example.ids)} tokens, " in plain
    assert "user, assistant (learned)" in plain


def test_colours_hold_the_same_text(pocket: Base, mixed: str) -> None:
    shown = find_row(read(pocket, train=mixed, **DROPPING), "2")
    coloured = row_text(shown, colour=True)
    assert re.sub("\x1b\\[[0-9;]*m|\u21b5", "", coloured).startswith(shown.traced.text)
    learned = [text for style, text in re.findall("\x1b\\[([0-9;]+)m([^\x1b]*)", coloured) if "48;5;" in style]
    assert "".join(learned) == "answer 2</s>"
    assert len(set(re.findall("48;5;([0-9]+)", coloured))) == 2, "neighbouring tokens cannot be told apart"
    assert "\x1b[1;35m<s>" in coloured


@pytest.mark.parametrize("colour", [True, False])
def test_a_row_cannot_steer_the_terminal(pocket: Base, odd: str, colour: bool) -> None:
    text = row_text(find_row(read(pocket, train=odd), "1"), colour=colour)
    ours = re.sub("\x1b\\[[0-9;]*m", "", text) if colour else text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", ours)
    assert "\u241b[31mred" in ours
    assert "<U+202E>evil<U+202C>" in ours


# --- one step ---


def test_a_step_is_shown_as_it_is_trained(pocket: Base, mixed: str) -> None:
    data = read(pocket, train=mixed, **DROPPING)
    plan = plan_of(data, batch_size=7, tokens_per_pass=400)
    layout = lay_out_steps(plan.mixture, batch_size=7, steps=plan.steps, seed=plan.seed)
    seen = []
    for number in range(1, plan.steps + 1):
        step = find_step(data, plan, number)
        rows = [row.where for each in step.passes for row in each.rows]
        members = layout[number - 1]
        assert sorted(rows) == sorted(data.train[i].where for i in members)
        cut = cut_into_passes([data.train[i].tokens for i in members], tokens_per_pass=400)
        assert [[row.where for row in each.rows] for each in step.passes] == [
            [data.train[members[position]].where for position in positions] for positions in cut
        ]
        for each in step.passes:
            assert each.tokens == sum(len(row.traced.example.ids) for row in each.rows) <= 400
        seen += rows
    assert sorted(seen) == sorted(2 * [example.where for example in data.train])  # two epochs
    for wrong in (0, -1, plan.steps + 1):
        with pytest.raises(UserError, match=f"there is no step {wrong}; the run has 6 steps"):
            find_step(data, plan, wrong)


def test_a_step_s_passes_are_told(pocket: Base, mixed: str) -> None:
    data = read(pocket, train=mixed, **DROPPING)
    step = find_step(data, plan_of(data, batch_size=7, tokens_per_pass=400), 1)
    text = step_text(step, colour=False)
    assert text.count("=== step 1, pass ") == len(step.passes) > 1
    assert text.count("[[answer ") == 7
    assert f"{step.passes[0].tokens} of 400 tokens ({step.passes[0].tokens / 400:.0%})" in text
    values = step.to_json()
    assert [each["share"] for each in values["passes"]] == [round(each.tokens / 400, 4) for each in step.passes]


# --- the page ---


class Page(HTMLParser):
    """What a browser would make of a page: its rows, their tokens, and everything that could load or run something."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[dict] = []
        self.texts: dict[str, list[str]] = {}
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag in {"meta", "input", "br", "rect"}:
            return
        kind = f"{tag}.{values.get('class') or ''}"
        self._inside.append(kind)
        if kind.startswith("article.row"):
            self.rows.append({"where": "", "text": "", "tokens": [], "ids": [], "all": ""})
        if kind == "div.text":
            self.rows[-1]["ids"] = [int(number) for number in (values["data-ids"] or "").split()]
        if tag == "i" and "div.text" in self._inside:
            self.rows[-1]["tokens"].append(["", (values.get("class") or "").split()])

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self._inside.pop().startswith(f"{tag}."), f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts.setdefault(self._inside[-1], []).append(data)
        if any(kind.startswith("article.row") for kind in self._inside):
            row = self.rows[-1]
            row["all"] += data
            if "span.where" in self._inside:
                row["where"] += data
            if "div.text" in self._inside:
                row["text"] += data
                if any(kind.startswith("i.") for kind in self._inside):
                    row["tokens"][-1][0] += data


def page_of(data: PreparedData, *, rows: int = 300, **train: object) -> tuple[str, Page]:
    plan = None if data.account.problems else plan_of(data, **train)
    text = write_page(data, name="tiny </title><script>", plan=plan, problems=data.account.problems, rows=rows)
    return text, Page(text)


def test_the_page_holds_every_row_token_and_label(pocket: Base, odd: str) -> None:
    data = read(pocket, train=odd, eval=1)
    _, page = page_of(data, batch_size=2)
    examples = {example.where: example for example in (*data.train, *data.eval)}
    assert sorted(row["where"] for row in page.rows) == sorted(examples)
    for row in page.rows:
        shown: ShownRow = find_row(data, row["where"])
        labels = examples[row["where"]].labels.tolist()
        assert row["text"] == shown.traced.text
        assert "".join(text for text, _ in row["tokens"]) == row["text"]
        assert row["ids"] == examples[row["where"]].ids.tolist()
        assert ["s" in kinds for _, kinds in row["tokens"]] == [label != -100 for label in labels]
        assert [text for text, kinds in row["tokens"] if "c" in kinds] == ["<s>", "</s>"]
    (own,) = [row for row in page.rows if row["where"] == f"{odd}:2"]
    assert own["text"].count("</script><b>bold</b> & <|eot_id|> </s>\rone\ttwo") == 2
    assert "".join(text for text, kinds in own["tokens"] if "l" in kinds) == "</s></s>"


def test_nothing_on_the_page_loads_or_runs_but_our_own_script(pocket: Base, odd: str) -> None:
    text, page = page_of(read(pocket, train=odd))
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2  # the vocabulary and the search
    assert names.count("style") == 1
    assert "".join(page.texts["title."]).startswith("tiny </title><script>: what the model will see")
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "a"} & set(names)
    for _, values in page.tags:
        assert not {"src", "href", "style", "srcset"} & set(values)
        assert not [name for name in values if name.startswith("on")]
    (policy,) = [values["content"] for tag, values in page.tags if values.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http://" not in text
    assert "https://" not in text
    assert "\r" not in text, "a browser reads a carriage return as a newline, if it is not written as a reference"
    words = "".join(page.texts["script."]).partition('"use strict"')[0]
    assert "<" not in words, "a piece of the vocabulary could end the element"
    vocabulary = json.loads(words)
    assert all(pocket.tokenizer.id_to_token(int(token)) == piece for token, piece in vocabulary.items())
    assert {str(token) for row in page.rows for token in row["ids"]} == set(vocabulary)


def test_the_page_shows_steps_and_passes_in_training_order(pocket: Base, mixed: str) -> None:
    data = read(pocket, train=mixed, **DROPPING)
    train = {"batch_size": 7, "tokens_per_pass": 400}
    _, page = page_of(data, rows=10, **train)
    plan = plan_of(data, **train)
    expected = [row.where for n in (1, 2) for each in find_step(data, plan, n).passes for row in each.rows]
    rows = [row["where"] for row in page.rows if row["text"]]
    assert rows == expected[:10]
    assert page.texts["h3."][-2:] == ["Step 1", "Step 2"]
    assert any("10 of the 18 rows of the first epoch (3 steps of 6)" in text for text in page.texts["small."])


def test_rows_that_are_left_out_can_be_found_on_the_page(pocket: Base, mixed: str) -> None:
    _, page = page_of(read(pocket, train=mixed, **DROPPING))
    dropped = [row for row in page.rows if "dropped" in row["all"]]
    assert {row["where"] for row in dropped} == {f"{mixed}:{EMPTY + 1}", f"{mixed}:{LONG + 1}"}
    assert ["dropped: too_long" in row["all"] for row in dropped].count(True) == 1


def test_a_page_with_problems_has_no_steps_and_says_why(pocket: Base, mixed: str) -> None:
    data = read(pocket, train=mixed, max_tokens=200)
    text, page = page_of(data)
    assert "2 problems to solve before anything is trained" in page.texts["h3."]
    assert "Step 1" not in page.texts["h3."]
    assert len([row for row in page.rows if row["text"]]) == 18
    assert "refused: too_long" in text
