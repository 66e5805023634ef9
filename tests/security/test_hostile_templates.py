"""Chat templates that reach for the machine: none gets out, none takes more than its share; plain Jinja falls."""

# ruff: noqa: E501 - a payload stands on one line

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import POCKET
from tests.security.attacks import base, replace
from tests.security.conftest import Act

OBJECTS = (
    "cycler.__init__",
    "joiner.__init__",
    "namespace.__init__",
    "lipsum",
    "self.__init__",
    "cycler.next",
    "joiner.__call__",
)
WAYS = {
    "dots": "{{ OBJECT.__globals__.__builtins__.open('MARKER', 'w') }}",
    "items": "{{ OBJECT['__globals__']['__builtins__']['open']('MARKER', 'w') }}",
    "attr": "{{ (OBJECT|attr('__globals__'))['__builtins__']['open']('MARKER', 'w') }}",
    "import": "{% set i = OBJECT.__globals__.__builtins__.__import__ %}{{ i('os').system('touch MARKER') }}",
}
ESCAPES = {f"{way} from {thing}": text.replace("OBJECT", thing) for way, text in WAYS.items() for thing in OBJECTS} | {
    "subclasses": "{% for c in ().__class__.__base__.__subclasses__() %}{% if c.__name__ == 'catch_warnings' %}"
    "{{ c()._module.__builtins__['open']('MARKER', 'w') }}{% endif %}{% endfor %}",
    "subclasses of a message": "{% for c in messages.__class__.__mro__[1].__subclasses__() %}"
    "{% if c.__name__ == 'catch_warnings' %}{{ c()._module.__builtins__['open']('MARKER', 'w') }}{% endif %}{% endfor %}",
    "escaped letters": "{{ cycler['\\x5f_init\\x5f_']['\\x5f_globals\\x5f_'].os.system('touch MARKER') }}",
    "joined letters": "{{ lipsum|attr('_' ~ '_globals_' ~ '_')|attr('get')('os')|attr('system')('touch MARKER') }}",
    "a loop": "{% for a in [1] %}{{ loop.__init__.__globals__.__builtins__.open('MARKER', 'w') }}{% endfor %}",
    "a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "a mapped attribute": "{% for g in [lipsum]|map(attribute='__globals__') %}{{ g.os.system('touch MARKER') }}{% endfor %}",
}  # fmt: skip

GREEDY = {
    "a repeated text": "{{ 'x' * 10**10 }}",
    "a wide text": "{{ 'x' | center(10**10) }}",
    "a wide format": "{{ '%9999999999s' % 'a' }}",
    "a wide format of a format": "{{ '{:>{width}}'.format('a', width=9999999999) }}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}",
    "a joined list": "{{ (['x' * 1000000] * 1000000) | join }}",
    "a text doubled": "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a caught block": "{% set s = 'x' * 1000000 %}{% set b %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}{{ b }}",
    "lists that share": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
    "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "replaced letters": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "translated letters": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "sorting for ever": "{% for a in range(99999) %}{% set b = range(99999) | sort %}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
}  # fmt: skip
MOST_SECONDS, MOST_MIB = 5, 256


def test_no_template_gets_out(tmp_path: Path, act: Act) -> None:
    marker = tmp_path / "EXECUTED"
    for name, text in ESCAPES.items():
        source = text.replace("MARKER", str(marker))
        done = act("ours", tmp_path, template=source)
        assert not marker.exists(), name
        assert done["code"] == 1, (name, done["text"])
        assert "TemplateProblem" in done["text"], name
        act("theirs", tmp_path, template=source)
        assert marker.exists(), f"{name} is a dud"
        marker.unlink()
    assert len(ESCAPES) == 35


LONG = {"sorting for ever", "a macro that calls itself twice"}


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.soak if each in LONG else ()) for each in GREEDY]
)
def test_no_template_takes_more_than_its_time_and_memory(name: str, tmp_path: Path, act: Act) -> None:
    done = act("ours", tmp_path, template=GREEDY[name])
    assert done["code"] == 1
    assert "does not take this conversation" in done["text"].splitlines()[-1]
    assert done["mib"] <= MOST_MIB
    # On a core of its own 5 s of the clock; computing time is what a busy machine does not stretch.
    assert done["cpu"] <= MOST_SECONDS
    plain = act("theirs", tmp_path, template=GREEDY[name], limit_mib=512, cpu_seconds=1)
    assert plain["code"] != 0  # killed, or out of memory


@pytest.mark.parametrize("place", ["base", "tokenizer_config", "adapter", "release"])
def test_the_template_that_comes_with_a_model_is_held_too(place: str, tmp_path: Path, act: Act) -> None:
    marker, folder = tmp_path / "EXECUTED", tmp_path / "model"
    source = ESCAPES["dots from cycler.__init__"].replace("MARKER", str(marker))
    base(folder, tokenizer={"chat_template": source} if place == "tokenizer_config" else {})
    typed = ["generate", str(folder), "--prompt", "x", "--max-new-tokens", "1"]
    if place in ("base", "release"):
        replace(folder / "chat_template.jinja", source)
    else:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    if place == "adapter":
        write_adapter(tmp_path / "adapter")
        (tmp_path / "adapter" / "chat_template.jinja").write_text(source)
        typed = ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    done = act("command_line", tmp_path, typed=typed)
    assert not marker.exists()
    assert done["code"] == 2, done["text"]
    assert "__init__" in done["text"]
    assert "Traceback" not in done["text"]


def write_adapter(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(POCKET)}))
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1, 8)},
              folder / "adapter_model.safetensors")  # fmt: skip
