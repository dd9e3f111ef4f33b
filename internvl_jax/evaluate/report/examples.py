"""The sections that show what the model did with single pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from internvl_jax.batch import LANGUAGES
from internvl_jax.evaluate.report.markup import Markup, element, phrase, picture

Row = Mapping[str, Any]

RIGHT_TO_LEFT = frozenset(("ar", "fa", "he", "ur"))


def names_of_pictures(rows: Sequence[Row]) -> Markup | None:
    """Pictures and the best names in every language (`NameRetrieval.examples`)."""
    if not rows:
        return None
    languages = [entry["language"] for entry in rows[0]["languages"]]
    body = []
    for row in rows:
        cells = [_best_names(entry) for entry in row["languages"]]
        body.append(element("tr", element("th", *_shown(row)), cells))
    return _section(
        "From picture to name",
        "The three best names of the whole list in each language; the right one is marked, and "
        "where it is not among them, its place is told. The pictures are spread evenly over the "
        "list, not chosen by result.",
        _table(languages, body, "gallery"),
    )


def _best_names(entry: Row) -> Markup:
    language = entry["language"]
    items = [
        phrase(name["text"], language, "right" if name["right"] else None, "li")
        for name in entry["names"]
    ]
    if not any(name["right"] for name in entry["names"]):
        items.append(phrase(f"{entry['rank']}. {entry['right']}", language, "answer", "li"))
    return element("td", element("ol", items), dir=direction(language))


def pictures_of_names(queries: Sequence[Row]) -> Markup | None:
    """Names and the best pictures (`NameRetrieval.examples`)."""
    if not queries:
        return None
    blocks = []
    for query in queries:
        pictures = [
            picture(
                found["image"],
                "the right picture" if found["right"] else "another picture",
                64,
                "tile right" if found["right"] else "tile",
            )
            for found in query["pictures"]
        ]
        place = f"{LANGUAGES.get(query['language'], query['language'])} · place {query['rank']}"
        head = element(
            "p", phrase(query["text"], query["language"], name="bdi"), element("small", place)
        )
        blocks.append(
            element("div", head, element("div", pictures, class_="strip"), class_="query")
        )
    return _section(
        "From name to picture",
        "The best pictures for a name, best first; the right one is framed, and its place stands "
        "on the right. Names, too, are spread evenly over the list.",
        element("div", blocks, class_="queries"),
    )


def captions(rows: Sequence[Row]) -> Markup | None:
    """Generated captions (`Captions.examples`)."""
    if not rows:
        return None
    languages = [entry["language"] for entry in rows[0]["captions"]]
    body = []
    for row in rows:
        cells = []
        for entry in row["captions"]:
            language, verdict = entry["language"], entry["verdict"]
            said = phrase(
                entry["text"] or "(nothing)", language, "said hit" if verdict else "said", "div"
            )
            note = {"name": "the name", "keyword": "a keyword fits"}.get(verdict)
            below = (
                element("small", note)
                if note
                else phrase(f"({entry['right']})", language, name="small")
            )
            cells.append(element("td", said, below, class_="cell", dir=direction(language)))
        body.append(element("tr", element("th", *_shown(row)), cells))
    return _section(
        "Captions",
        "What the model writes after “English caption:” and its like, token by token. A caption "
        "that is the name, or has one of the picture's keywords among its items, is marked; under "
        "the others stands the name.",
        _table(languages, body, "gallery caps"),
    )


def dialogues(rows: Sequence[Row]) -> Markup | None:
    """Conversations (`Dialogue.examples`)."""
    if not rows:
        return None
    talks = []
    for row in rows:
        turns = []
        for turn in row["turns"]:
            language = turn["language"]
            right = None
            if not turn["correct"]:
                right = element(
                    "small",
                    "should be ",
                    phrase(turn["right"], language, name="bdi"),
                    class_="wrong",
                )
            turns.append(
                element(
                    "div",
                    phrase(turn["question"], "en", "ask", "p"),
                    phrase(turn["answer"] or "(nothing)", language, "say", "p"),
                    right or element("small", "right"),
                    class_="turn",
                )
            )
        talks.append(
            element("div", picture(row["image"], row["name"], 84, "tile"), turns, class_="talk")
        )
    return _section(
        "A dialogue",
        "Several questions about one picture; the model's own answers are part of what it reads "
        "next.",
        element("div", talks, class_="talks"),
    )


def direction(language: str) -> str | None:
    """The direction of a language's column, where it is not the page's."""
    return "rtl" if language in RIGHT_TO_LEFT else None


def _shown(row: Row) -> tuple[Markup, Markup]:
    name = element("div", row["name"], class_="shown", dir="auto")
    return picture(row["image"], row["name"], 68, "tile"), name


def _table(languages: Sequence[str], body: Sequence[Markup], class_: str) -> Markup:
    titles = [element("th", LANGUAGES.get(code, code), dir=direction(code)) for code in languages]
    head = element("thead", element("tr", element("th"), titles))
    table = element("table", head, element("tbody", body), class_=class_)
    return element("div", table, class_="scroll")


def _section(title: str, intro: str, content: Markup) -> Markup:
    return element("section", element("h2", title), element("p", intro, class_="intro"), content)
