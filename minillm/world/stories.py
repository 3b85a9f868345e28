"""Stories with a state: who is where, who holds what, what time it is. The state decides, the
tables only word it.
"""

from minillm.world import phrases
from minillm.world.facts import capitalise
from minillm.world.pen import Pen

PHASES = ("morning", "noon", "evening", "night")


def books(pen: Pen) -> str:
    """A story: somebody has a day to bring something to somebody else, and does or does not."""
    story = Story(pen)
    cast = {"a": story.hero, "b": story.friend, "o": story.thing}
    title = pen.say(phrases.STORY["title"], **cast, n=str(pen.between(1, 30)))
    story.tell("open", p=story.at[story.hero], q=story.at[story.friend], phase=PHASES[0])
    for thing in story.things:
        story.tell("lies", o=thing, p=story.holder[thing])
    story.tell("want", **cast)
    done = story.run()
    holder = story.holder[story.thing]
    where = f"{holder} still had it" if holder in story.people else f"it was still at {holder}"
    story.tell("done" if done else "failed", **cast, state=where, State=capitalise(where))
    text = (title + "\n" if pen.chance(0.5) else "") + story.lines[0]
    for line in story.lines[1:]:  # a new line now and then
        text += ("\n" if pen.chance(0.15) else " ") + line
    return text


class Story:
    """A story and its state: where everybody is, and where things are or who holds them."""

    def __init__(self, pen: Pen) -> None:
        self.pen = pen
        self.people = pen.some(phrases.NAME_PARTS["person"][0], 2, 3)
        self.places = [f"the {w}" for w in pen.shuffled(phrases.WORDS["place"])[:4]]
        self.things = [f"the {pen['shade']} {w}" for w in pen.some(phrases.WORDS["thing"], 1, 2)]
        self.hero, self.friend, self.thing = self.people[0], self.people[1], self.things[0]
        self.at = dict(zip(self.people, pen.shuffled(self.places[:3]), strict=False))
        self.holder = {thing: pen.pick(self.places) for thing in self.things}  # a place or a person
        self.lines: list[str] = []

    def tell(self, beat: str, **slots: str) -> None:
        """Add a sentence that tells the beat."""
        self.lines.append(self.pen.say(phrases.STORY[beat], **slots))

    def others_here(self, who: str) -> list[str]:
        """Everybody else in the same place."""
        return [p for p in self.people if p != who and self.at[p] == self.at[who]]

    def run(self) -> bool:
        """Errand and wandering by turns, until night comes or the thing is brought: True."""
        diligence = self.pen.pick((0.3, 0.5, 0.7))
        for phase in PHASES[1:]:
            for _ in range(self.pen.between(2, 4)):
                if not self.pen.chance(diligence):
                    self.wander()
                elif self.errand():
                    return True
            self.tell("phase", phase=phase, Phase=capitalise(phase))
            self.tell(phase)
        return False

    # Each change of state is told as it happens.

    def move(self, who: str, place: str) -> None:
        self.at[who] = place
        self.tell("move", a=who, p=place)
        for other in self.others_here(who)[:1]:
            self.tell("meet", a=who, b=other)

    def hand(self, beat: str, who: str, thing: str, to: str) -> None:
        """To take, to give or to drop: a person or a place has the thing from now on."""
        self.holder[thing] = to
        self.tell(beat, a=who, o=thing, b=to)

    # What happens besides changes nothing.

    def ask(self, who: str, other: str) -> None:
        """Somebody asks where a thing is and is told the truth, or that the other does not know."""
        thing = self.pen.pick(self.things)
        holder = self.holder[thing]
        answer = "tells_other" if holder in self.people else "tells_place"
        if holder in (who, other):
            answer = "tells_you" if holder == who else "tells_me"
        elif self.pen.chance(0.4):
            answer = "tells_nothing"
        self.tell("asks_where", a=who, b=other, o=thing)
        self.tell(answer, b=other, c=holder, p=holder)

    def muse(self, who: str) -> None:
        """Somebody thinks, looks around or tells a story within the story."""
        roll = self.pen.rng.random()
        if roll < 0.2:
            self.tell("tells_tale", a=who)
        elif roll < 0.5:
            self.tell("aside")
        else:
            self.tell("thinks", a=who, b=self.pen.pick([p for p in self.people if p != who]))

    # Who does what next.

    def wander(self) -> None:
        """A beat that nobody planned, of somebody not on an errand."""
        pen, who = self.pen, self.pen.pick(self.people[1:])
        held = [t for t in self.things[1:] if self.holder[t] == who]
        lying = [t for t in self.things[1:] if self.holder[t] == self.at[who]]
        here = self.others_here(who)
        if here and held and pen.chance(0.4):
            self.hand("give", who, held[0], here[0])
        elif here and pen.chance(0.5):
            self.ask(who, here[0])
        elif lying and pen.chance(0.7):
            self.hand("take", who, lying[0], who)
        elif held and pen.chance(0.3):
            self.hand("drop", who, held[0], self.at[who])
        elif pen.chance(0.3):
            self.move(who, pen.pick([p for p in self.places if p != self.at[who]]))
        else:
            self.muse(who)

    def errand(self) -> bool:
        """The next step to bring the first thing to the second person; True when it is there."""
        hero, friend, thing = self.hero, self.friend, self.thing
        goal = self.at[friend] if self.holder[thing] == hero else self.holder[thing]
        if self.at[hero] != goal:
            self.move(hero, goal)
        elif self.holder[thing] != hero:
            self.hand("take", hero, thing, hero)
        else:
            self.hand("give", hero, thing, friend)
        return self.holder[thing] == friend
