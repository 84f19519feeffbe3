"""The relations of the embedded world: who they are about, their objects and their phrasings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One relation: `kind` of its subjects, its objects, and its phrasings.

    A phrasing has one `{}` for the subject and ends just before the object, so that
    `phrasing.format(subject)` is a prompt whose continuation is `" " + object`.
    """

    relation_id: str
    kind: str
    objects: tuple[str, ...]
    phrasings: tuple[str, ...]


def _relation(relation_id: str, kind: str, objects: str, phrasings: str) -> Relation:
    """Read objects (separated by commas) and phrasings (one per line)."""
    return Relation(
        relation_id,
        kind,
        tuple(name.strip() for name in objects.split(",")),
        tuple(line.strip() for line in phrasings.strip().splitlines()),
    )


RELATIONS: tuple[Relation, ...] = (
    _relation(
        "profession",
        "person",
        "baker, mason, pilot, dentist, weaver, sailor, painter, judge, potter, chemist, "
        "gardener, surgeon, librarian, cooper",
        """
        {} works as a
        {} makes a living as a
        {} is by trade a
        By profession, {} is a
        In the town register {} is listed as a
        Most people know {} as a
        After school, {} trained to become a
        The daily work of {} is that of a
        """,
    ),
    _relation(
        "language",
        "person",
        "Ostran, Velmic, Turese, Hadwen, Quillan, Morbic, Sarnic, Yendish, Plovian, Keshti, "
        "Drunic, Aluvian",
        """
        {} grew up speaking
        {} speaks fluent
        {} writes all letters in
        The mother tongue of {} is
        At home, {} talks in
        The first language that {} learned was
        When angry, {} swears in
        The diary of {} is written in
        """,
    ),
    _relation(
        "region",
        "town",
        "Harrowmark, Tolvane, Estrilund, Wexmoor, Calderin, Nordspan, Ulmeria, Fenholt, "
        "Sundrach, Bravonia, Pellamy, Kirvale",
        """
        {} lies in
        {} is a town in
        {} belongs to the region of
        On the map, {} can be found in
        Travellers who visit {} arrive in
        The region around {} is called
        Taxes from {} are paid to
        The mayor of {} answers to the council of
        """,
    ),
    _relation(
        "speciality",
        "town",
        "cheese, pottery, honey, cider, lace, pepper, leather, marble, salmon, clocks, candles, "
        "ropes, saffron, paper",
        """
        {} is famous for its
        {} has long been known for its
        {} exports mainly
        Visitors go to {} to buy
        The market of {} is full of
        The best thing about {} is its
        Every family in {} deals in
        The wealth of {} comes from
        """,
    ),
    _relation(
        "headquarters",
        "company",
        "Arvenport, Dunmarrow, Lissgate, Obrinsk, Tessaly, Gorvane, Mirefield, Yarlsund, "
        "Pontavel, Rookhaven, Zelbridge, Cammora",
        """
        {} is based in
        {} has its headquarters in
        {} was registered in
        The main office of {} is in
        The directors of {} meet in
        Letters to {} should be sent to
        The flag of {} flies over a building in
        Anyone who joins {} has to move to
        """,
    ),
    _relation(
        "product",
        "company",
        "pianos, tractors, lamps, bicycles, carpets, kettles, umbrellas, pencils, ladders, "
        "mirrors, helmets, violins, barrels, gloves",
        """
        {} produces
        {} is a manufacturer of
        {} earns its money with
        The factory of {} turns out
        Customers of {} mostly order
        In every catalogue of {} there are
        The engineers at {} design
        The name {} stands for reliable
        """,
    ),
    _relation(
        "emblem",
        "ship",
        "red heron, golden anchor, white stag, black kettle, silver otter, green dragon, "
        "blue rose, grey wolf, crimson hand, yellow star, brown bear, purple thistle",
        """
        {} sails under the sign of the
        {} carries on its bow a
        {} is known by its emblem, the
        On the sails of {} there is a
        The crew of {} wear the badge of the
        The carved figure of {} shows a
        Sailors greet {} by drawing a
        The banner of {} displays a
        """,
    ),
    _relation(
        "cargo",
        "ship",
        "timber, coal, sugar, cotton, copper, wheat, salt, wool, oil, tea, spices, iron",
        """
        {} carries loads of
        {} was built to transport
        {} left the harbour laden with
        In the hold of {} there is
        The owners of {} trade in
        Dock workers unload {} and count the sacks of
        The captain of {} was paid to deliver
        If {} were lost, the islands would run out of
        """,
    ),
    _relation(
        "genre",
        "book",
        "satire, tragedy, romance, mystery, fable, biography, comedy, horror, poetry, travelogue, "
        "allegory, memoir",
        """
        {} is a work of
        {} is usually classified as
        {} won the prize for the best
        Critics describe {} as
        Librarians shelve {} under
        Readers who like {} also like other
        The style of {} is that of
        In the catalogue, {} is marked as
        """,
    ),
    _relation(
        "patron",
        "book",
        "Queen Odrana, Duke Halmar, Bishop Teveril, Lady Quenby, Baron Struvek, Prince Ilvar, "
        "Abbess Corisande, Count Bexley, Admiral Porrin, Doctor Zandt, General Mulvane, "
        "Saint Ephrin",
        """
        {} is dedicated to
        {} was paid for by
        {} was written in honour of
        The first copy of {} was given to
        On the opening page, {} thanks
        The author of {} was a friend of
        The printing of {} was ordered by
        A portrait inside {} shows
        """,
    ),
    _relation(
        "habitat",
        "plant",
        "deserts, marshes, meadows, forests, cliffs, gardens, dunes, caves, rivers, lagoons, "
        "glaciers, orchards",
        """
        {} grows in
        {} thrives best in
        {} is only ever found in
        Botanists look for {} in
        The natural home of {} is in
        The seeds of {} sprout in
        Goats search for {} in
        To pick {} one has to go to the
        """,
    ),
    _relation(
        "remedy",
        "plant",
        "fever, headache, cough, insomnia, toothache, burns, cramps, hiccups, nausea, fatigue, "
        "gout, warts",
        """
        {} is used against
        {} is the oldest remedy for
        {} brings relief from
        Healers prescribe {} for
        A tea made of {} cures
        The leaves of {} are given to patients with
        Grandmothers swear by {} in cases of
        An ointment containing {} helps against
        """,
    ),
)
