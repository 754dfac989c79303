from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from llmctl.text.cleaning.boilerplate import Boilerplate, RepeatedLines
from llmctl.text.cleaning.params import BoilerplateParams, RepeatedLinesParams
from llmctl.text.cleaning.step import Drop, Noted
from llmctl.text.documents import Document

TEXT = (
    "The museum is open every day but Monday.\nTickets are sold at the door, and children pay nothing.\n"
    "- a list item\n- another one\nCookies are baked in the café on Sundays.\n\nWe share what we find with schools."
)
LINES = {
    "cookies": "We use cookies to improve your experience. Accept all",
    "rights": "© 2024 The Museum. All rights reserved.",
    "links": "Privacy Policy | Imprint | Contact",
    "navigation": "Skip to main content",
    "trail": "Home > Visit > Opening hours",
    "bar": "Home | About | Visit | Shop",
    "account": "Log in or register",
    "sharing": "Share on Facebook, Twitter and LinkedIn",
    "newsletter": "Sign up for our newsletter today",
    "advertisement": "Advertisement",
}


def step(**params: object) -> Boilerplate:
    return Boilerplate(BoilerplateParams(name="boilerplate", **params), 0)


@pytest.mark.parametrize("kind", LINES)
def test_planted_lines_go_and_the_text_stays(kind: str) -> None:
    outcome = step()(Document("1", "s", f"{LINES[kind]}\n{TEXT}\n\n{LINES[kind]}"))
    assert isinstance(outcome, Noted)
    assert (outcome.document.text, outcome.found) == (TEXT, {kind: 2})


def test_clean_text_is_left_as_it_is_and_menus_go() -> None:
    document = Document("1", "s", TEXT)
    assert step()(document) is document
    menu = "Exhibitions\nCollections\nOpening hours\nThe shop\n"
    assert step()(Document("1", "s", menu + TEXT)).document.text == TEXT  # type: ignore[union-attr]
    assert step(menus=5)(Document("1", "s", menu + TEXT)).text == menu + TEXT  # type: ignore[union-attr]
    assert step()(Document("1", "s", menu)) == Drop("nothing but boilerplate")
    assert step(patterns=["Ad: .*"])(Document("1", "s", f"Ad: buy\n{TEXT}")).found == {"pattern": 1}  # type: ignore[union-attr]
    with pytest.raises(ValidationError, match="no regular expression"):
        BoilerplateParams(name="boilerplate", patterns=["("])


def repeated(**params: object) -> RepeatedLines:
    return RepeatedLines(RepeatedLinesParams(name="repeated-lines", **params), 0)


def pages() -> list[Document]:
    """Five pages of one site with a header, two of another."""
    found = [
        Document(f"a{n}", f"a/{n}.html", f"Welcome to our lovely site\nPage number {n} tells its own story.")
        for n in range(5)
    ]
    return found + [
        Document(f"b{n}", f"b/{n}.html", f"Welcome to our lovely site\nOther page {n} of the other site.")
        for n in range(2)
    ]


@pytest.mark.parametrize("cut", [(1, 1), (3, 4)])
def test_lines_that_documents_of_a_source_share_go(cut: tuple[int, int], corpus: Callable[..., Any]) -> None:
    outcomes, resolution = corpus(repeated(), pages(), *cut)
    texts = [outcome.document.text if isinstance(outcome, Noted) else outcome.text for outcome in outcomes]
    assert texts[:5] == [f"Page number {n} tells its own story." for n in range(5)]
    assert texts[5:] == [document.text for document in pages()[5:]], "two are fewer than min_documents"
    assert resolution.facts == {"lines": 1, "most_frequent": [["Welcome to our lovely site", 5]]}


def test_parameters_of_repeated_lines(corpus: Callable[..., Any]) -> None:
    def edited(**params: object) -> int:
        return sum(isinstance(outcome, Noted) for outcome in corpus(repeated(**params), pages())[0])

    assert edited() == 5
    assert edited(within="corpus") == 7
    assert edited(keep_first=True) == 4
    assert edited(min_documents=2) == 7
    assert edited(min_documents=6) == 0
    assert edited(min_chars=40) == 0
    assert edited(unit="paragraph") == 0
    rare = [*pages()[:3], *(Document(f"c{n}", f"a/c{n}", f"Quite another text, number {n}.") for n in range(20))]
    assert not any(isinstance(outcome, Noted) for outcome in corpus(repeated(), rare)[0])
    assert sum(isinstance(outcome, Noted) for outcome in corpus(repeated(min_share=0.1), rare)[0]) == 3
    same = [Document(f"{n}", f"a/{n}", "Only this line is here.") for n in range(4)]
    assert all(isinstance(outcome, Drop) for outcome in corpus(repeated(), same)[0])
