"""What a router may know of a query: its text, its answer choices, what its task is about."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """One prompt as routers that look at text see it.

    Attributes:
        text: the prompt.
        choices: the answers to choose from, if there are any.
        task: a description of the evaluation task, which only routers that say so read.
    """

    text: str
    choices: tuple[str, ...] = ()
    task: str = ""

    @property
    def retrieval_text(self) -> str:
        """What is embedded of it, in the form of PHATGOOSE's retrieval baseline."""
        choices = ", ".join(choice.strip() for choice in self.choices) or "None"
        return f"Answer Choices: {choices}, Instance: {self.text}"
