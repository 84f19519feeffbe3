"""What follows from the relations: facts of their objects, questions back to their subjects."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hop:
    """A fact that every object of a relation has: `values[i]` is that of object i, and its alone.

    A phrasing has one `{}` and ends just before the value: for the object in `about_object`, for
    the subject of the relation in `about_subject`, which takes both facts to answer.
    """

    values: tuple[str, ...]
    about_object: tuple[str, ...]
    about_subject: tuple[str, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _hop(values: str, about_object: str, about_subject: str) -> Hop:
    """Read values (separated by commas, in the order of the objects) and phrasings (one a line)."""
    names = tuple(name.strip() for name in values.split(","))
    return Hop(names, _lines(about_object), _lines(about_subject))


HOPS: dict[str, Hop] = {
    "language": _hop(
        "Glam, Brait, Drub, Thaw, Kesh, Joul, Yist, Lom, Vap, Hes, Mup, Seb",
        """
        The script of {} is called
        Books in {} are printed in
        The letters of {} have the name
        """,
        """
        {} learned at school to write in
        The letters that {} uses at home have the name
        The name on the door of {} is painted in
        The script in which {} was taught to read is called
        """,
    ),
    "region": _hop(
        "Dod, Glob, Tip, Noj, Fug, Woz, Zod, Jaz, Bib, Kod, Rij, Sut",
        """
        The coin of {} is the
        People all over {} pay with the
        The treasury of {} mints the
        """,
        """
        {} accepts no coin but the
        People in {} pay with the
        On market day in {} one needs many a
        The coin that is worth most in {} is the
        """,
    ),
    "headquarters": _hop(
        "Drou, Gloth, Brok, Trous, Shis, Vogl, Woum, Yib, Glej, Cegl, Loust, Hik",
        """
        The river that flows through {} is the
        The bridges of {} cross the
        In spring {} is flooded by the
        """,
        """
        {} looks from its main office over the
        The river beside the main office of {} is the
        Barges bring goods to {} on the
        The directors of {} go for walks along the
        """,
    ),
    "cargo": _hop(
        "Trok, Glath, Stup, Truk, Nob, Sheg, Kait, Jap, Fep, Doub, Vus, Zoj",
        """
        The guild that trades in {} is that of
        The price of {} is set by the guild of
        Dealers in {} swear an oath to the guild of
        """,
        """
        {} pays its dues to the guild of
        The cargo of {} is sold by the guild of
        The owners of {} took an oath to the guild of
        When {} comes home, its hold is emptied by the guild of
        """,
    ),
    "patron": _hop(
        "Dun, Grand, Bex, Glit, Thiz, Draiw, Trab, Bram, Stouy, Lout, Tros, Youw",
        """
        {} lives in the castle of
        The castle of {} is
        Letters to {} should be sent to the castle of
        """,
        """
        {} was first read aloud in the castle of
        The first copy of {} is kept in the castle of
        The castle of the patron of {} is
        Those who ordered {} to be written lived in the castle of
        """,
    ),
    "habitat": _hop(
        "Dreh, Gaip, Jesh, Maiy, Kaid, Poud, Sifi, Vup, Suw, Zey, Jey, Biy",
        """
        The spirit that watches over {} is
        Whoever walks in {} greets the spirit
        Stones found in {} are marked with the name of
        """,
        """
        {} may be picked only with a prayer to
        Where {} grows, the spirit that watches is
        Those who gather {} greet the spirit
        The leaves of {} are offered to
        """,
    ),
}
"""By relation: what its objects have. One relation of each kind of subjects has such objects."""


REVERSED: dict[str, tuple[str, ...]] = {
    "person": _lines(
        """
        The {profession} who grew up speaking {language} is
        Of all who speak {language}, the only {profession} is
        In the town register, the {profession} with {language} as a mother tongue is
        By trade a {profession} and at home in {language} is
        """
    ),
    "town": _lines(
        """
        The town in {region} that is famous for its {speciality} is
        Visitors to {region} who want to buy {speciality} go to
        Of all towns in {region}, the one that exports {speciality} is
        The best {speciality} of {region} comes from
        """
    ),
    "company": _lines(
        """
        The company based in {headquarters} that produces {product} is
        Of all makers of {product}, the one in {headquarters} is
        Customers in {headquarters} order {product} from
        The {product} of {headquarters} are made by
        """
    ),
    "ship": _lines(
        """
        The ship under the sign of the {emblem} that carries {cargo} is
        Of all ships laden with {cargo}, the one with the {emblem} is
        The {emblem} and a load of {cargo} are the marks of
        With {cargo} in its hold and the {emblem} on its bow sails
        """
    ),
    "book": _lines(
        """
        The work of {genre} that is dedicated to {patron} is
        Of all books for {patron}, the one classified as {genre} is
        The taste of {patron} for {genre} led to
        In the catalogue, the {genre} paid for by {patron} is
        """
    ),
    "plant": _lines(
        """
        The plant in {habitat} that is used against {remedy} is
        Of all remedies for {remedy}, the one that grows in {habitat} is
        Healers go to {habitat} against {remedy} and pick
        Against {remedy} one looks in {habitat} for
        """
    ),
}
"""By kind: questions for the one subject with an object in each of the kind's two relations.

An object alone has a dozen subjects or more, so there is no answer to "a town in Wexmoor is"; two
objects together have one subject often enough.
"""
