"""The page of `benchmarks.packages`: counts, a line for each model, failures with reasons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .truths import addresses

RULES = ("adapterx_ffn", "lora", "adaptformer", "ssf", "arc", "vpt_deep", "adapterx")
PROMPTS = ("vpt_deep", "adapterx")  # which put prompts among the tokens
OUTCOMES = (
    "runs", "rightly refused", "refused though plain", "partial", "wrong",
    "accepted though it cannot be right",
)  # fmt: skip
LONGEST = 400  # characters of a reason
SHORT = {"rightly refused": "refused", "refused though plain": "**refused**"}  # in the table
SHORT |= {word: f"**{word}**" for word in OUTCOMES[3:]}


def outcome(row: dict[str, Any], rule: str) -> str:
    """One word for what came of a rule set, in the light of the truth."""
    came, told = row["rules"].get(rule, ""), row["truth"]
    if not came:
        return "not tried"
    if came.startswith("runs"):
        may = _may(rule, told) or came != "runs"
        return "runs" if may else "accepted though it cannot be right"
    if not came.startswith("refused"):
        return "wrong" if not came.startswith("partial") else "partial"
    idle = "idle" in told and "gradient" in came
    known = (reason := told.get("refuses", "").partition(";")[0]) and reason in came
    known = known or (rule == "ssf" and "never ran" in came)  # it takes modules that idle, too
    plain = _must(rule, told) and not idle and not known
    return "refused though plain" if plain else "rightly refused"


def _may(rule: str, told: dict[str, str]) -> bool:
    return not (rule in PROMPTS and told.get("prompts", "").startswith("no"))


def _needed(told: dict[str, str], role: str) -> bool:
    """Whether the model has a role for certain."""
    return any(not address.endswith("?") for address in addresses(told.get(role, "-")))


def _must(rule: str, told: dict[str, str]) -> bool:
    if rule in PROMPTS:
        plain = told.get("prompts", "").startswith("yes")
        return plain and (rule == "vpt_deep" or _needed(told, "ffn"))
    needs = {"lora": ("qkv",), "ssf": (), "arc": ("qkv", "ffn")}.get(rule, ("ffn",))
    return all(_needed(told, role) for role in needs)


def page(rows: list[dict[str, Any]]) -> str:
    """Counts, a line for each model, every disagreement in words, and why prompts are refused."""
    good = [row for row in rows if "error" not in row]
    packages = {row["package"] for row in good}
    text = [f"{len(good)} models of {len(packages)} packages:", ""]
    for word in ("with", "without"):
        ffns = sum(not row[word].get("ffn") for row in good)
        whole = sum(not any(row[word].values()) for row in good)
        text.append(f"- {word} an example: networks right in {ffns}, all roles in {whole}")
    text += ["", *_counts(good), "", *_table(good), "", *_details(rows), *_prompts(good)]
    return "\n".join(text).rstrip() + "\n"


def _counts(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| rule set | {' | '.join(OUTCOMES)} |"
    yield f"|---|{'---:|' * len(OUTCOMES)}"
    for rule in (r for r in RULES if any(r in row["rules"] for row in rows)):
        came = [outcome(row, rule) for row in rows]
        yield f"| `{rule}` | {' | '.join(str(came.count(word)) for word in OUTCOMES)} |"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| model | roles | without an example | {' | '.join(RULES)} |".replace("_", "\\_")
    yield "|---" * (3 + len(RULES)) + "|"
    for row in rows:
        wrong = [", ".join(r for r, why in row[w].items() if why) for w in ("with", "without")]
        cells = [f"{row['package']}.{row['name']}", *(cell or "right" for cell in wrong)]
        came = [outcome(row, rule) for rule in RULES]
        words = [SHORT.get(word, word) for word in came]
        yield f"| {' | '.join([*map(_safe, cells), *words])} |"


def _details(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if lines := list(_disagreements(row)):
            yield from (f"### {_safe(row['package'])}.{_safe(row['name'])}", "", *lines, "")


def _disagreements(row: dict[str, Any]) -> Iterator[str]:
    if "error" in row:
        yield f"- {_safe(row['error'])}"
        return
    for word in ("with", "without"):
        for role, wrong in row[word].items():
            if wrong and not (word == "without" and row["with"].get(role) == wrong):
                yield f"- {role}, {word} an example: {_safe(wrong)}"
    for rule in RULES:
        if (came := outcome(row, rule)) not in ("runs", "rightly refused", "not tried"):
            told = row["truth"]["prompts"] if rule in PROMPTS else ""
            source = f" (by the source: {told})" if told else ""
            why = row["rules"][rule]
            why = why if len(why) <= LONGEST else f"{why[:LONGEST].rsplit(' ', 1)[0]} ..."
            yield f"- `{rule}`, {came}: {_safe(why + source)}"


def _prompts(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Where prompts need not be taken, by the reason that the source gives."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        may, _, why = row["truth"]["prompts"].partition("; ")
        if may != "yes" and outcome(row, "vpt_deep") == "rightly refused":
            reasons.setdefault(why, []).append(f"{row['package']}.{row['name']}")
    if reasons:
        yield from ("### Where prompts are rightly refused, by the sources", "")
    for why, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        yield f"- **{_safe(why)}**: {_safe(', '.join(names))}"


def _safe(text: str) -> str:
    for sign in "|*_<":
        text = text.replace(sign, f"\\{sign}" if sign != "<" else "&lt;")
    return text
