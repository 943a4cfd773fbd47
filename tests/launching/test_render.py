"""Words reach bash, YAML and Kubernetes as they are; templates take exactly their values."""

import re
import subprocess

import pytest
import yaml as pyyaml
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.errors import UserError
from speechjax.launching import render

NASTY = ["", "a b", "it's", '"', "$HOME", "$(id)", "`id`", "a\nb", "a\\nb", "\t\x1b[0m", "*", "~", "ä–\u2028\u0085",
         "--x=#y", "\x7f\ufeff", "a\\", "{{name}}", "'\n'"]  # fmt: skip
# Everything that a command line can hold, bytes that are no UTF-8 (surrogates of os.fsdecode) included.
arguments = st.text(
    st.one_of(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), st.characters(
        min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"])),
    max_size=20,
)  # fmt: skip


def heard(words: str, **environment: str) -> list[str]:
    """What bash makes of words, as a program would get them."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True, env={"PATH": "/bin", **environment}
    )
    return [word.decode("utf-8", "surrogateescape") for word in done.stdout.split(b"\0")[:-1]]


@settings(max_examples=40, deadline=None)
@given(st.lists(arguments, min_size=1, max_size=8), st.sampled_from(["C", "C.UTF-8"]))
def test_bash_hears_every_word_as_it_is(found, locale):
    quoted = " ".join(map(render.quote, found))
    assert quoted.encode("utf-8").decode().isprintable()  # one line, whatever is in it
    assert heard(quoted, LC_ALL=locale) == found


def test_bash_hears_the_nasty_ones():
    assert heard(" ".join(map(render.quote, NASTY))) == NASTY
    assert heard("a  $HOME", HOME="/there") == ["a", "/there"]  # what it makes of words without quotes


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_yaml_says_every_text_as_it_is(text):
    assert pyyaml.safe_load(f"- {render.yaml(text)}\n- last") == [text, "last"]


def test_yaml_refuses_bytes():
    with pytest.raises(UserError, match="UTF-8"):
        render.yaml("--x=\udcff")


def expanded(text: str, environment: dict[str, str]) -> str:
    """What Kubernetes makes of a word of a command: its documented rule, $(NAME) and $$."""
    return re.sub(
        r"\$(\$|\(([A-Za-z_]\w*)\))",
        lambda found: "$" if found[1] == "$" else environment.get(found[2], found[0]),
        text,
    )


@settings(deadline=None)
@given(st.lists(st.sampled_from(["$", "(", "PORT", ")", "$(PORT)", "x"]), max_size=8).map("".join))
def test_kubernetes_expands_nothing_of_ours(text):
    environment = {"PORT": "80"}
    assert expanded(render.kubernetes_words([text])[0], environment) == text


def test_kubernetes_would_expand_it_otherwise():
    assert expanded("a$(PORT)", {"PORT": "80"}) == "a80"


@pytest.fixture
def template(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    monkeypatch.setattr(render, "ROOT", tmp_path)
    return tmp_path / "launch" / "x"


def test_a_value_alone_on_its_line_keeps_the_indentation(template):
    template.write_text("a:\n  {{list}}\n{{none}}\nb: {{word}}-{{word}}\n")
    text = render.fill("x", dict(list="- 1\n- {{word}}", none="", word="w"))
    assert text == "a:\n  - 1\n  - {{word}}\nb: w-w\n"


@pytest.mark.parametrize("values", [{}, {"a": "1", "b": "2"}])
def test_template_and_values_must_fit(template, values):
    template.write_text("{{a}}\n")
    with pytest.raises(KeyError):
        render.fill("x", values)


def test_outside_of_a_checkout(template):
    with pytest.raises(UserError, match="checkout"):
        render.fill("slurm.sbatch", {})
