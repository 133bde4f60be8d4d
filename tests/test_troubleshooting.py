"""``docs/troubleshooting.md`` has an entry for all that packc says, and none for what it does not say."""

import re

from messages import HOLE, REPOSITORY, messages

# What only fills a hole of another message, or says what is and not why.
PARTS = {
    "  tokens      … of … padded (… left out)",
    "packed … of … mixers (…)",
    "  this rank   … of … tokens",
    "  waits       … (estimated: … ms, … ms exposed)",
    "    …  …  … KiB  … ms, … exposed, under …  …",
    "ms, estimated",
    "nothing packed (…)",
    "  not packed  …",
    "… in …: …, and … …",
    "the model",
    "; did you mean ……?",
    "… is not known at …",
    "… is not known before the graph runs",
    "what a head reads",
    "the labels of the loss",
    "a function of rows",
    "attention as it is written",
}
ENTRY = re.compile(r"^- `([^`]+)`", re.M)


def entries():
    """Each as it stands, with the expression that matches the messages it is for."""
    found = ENTRY.findall((REPOSITORY / "docs" / "troubleshooting.md").read_text())
    return {entry: re.compile(".*".join(map(re.escape, entry.split(HOLE))), re.S) for entry in found}


def test_every_message_has_its_entry():
    known = entries().values()
    missing = [
        f"{where}: {text}"
        for text, where in messages()
        if text not in PARTS and not any(entry.fullmatch(text) for entry in known)
    ]
    assert not missing, "docs/troubleshooting.md has no entry for\n" + "\n".join(missing)


def test_every_entry_is_of_a_message():
    said = {text for text, _ in messages()}
    assert said >= PARTS
    stale = [entry for entry, expression in entries().items() if not any(map(expression.fullmatch, said))]
    assert not stale, f"packc does not say {stale}"


def test_no_entry_would_match_anything():
    assert not [entry for entry in entries() if len(re.findall("[A-Za-z]", entry)) < 7]
