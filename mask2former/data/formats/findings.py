"""Problems and warnings about a data set, each with its file, record and remedy."""

import logging
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# How a finding begins that goes on from the name of its file, such as "is not valid JSON".
_PREDICATES = ("is ", "has ", "lists ", "holds ", "does not ", "cannot ")
# Warnings logged per data set; `tools/check_dataset.py` reports all.
_NUM_LOGGED = 10

NOTHING_TO_TRAIN_ON = (
    "has nothing to train on: no image has an object or segment in 'annotations', crowds apart; is "
    "it the JSON of a test split?"
)
NO_LABELLED_PIXEL = (
    "has nothing to train on: every pixel of every label map has the ignore label {ignore_label}; "
    "if that is the label of a class, correct the label maps or the ignore label"
)


class Finding(NamedTuple):
    """A problem or a warning.

    Attributes:
        file: the file it is about.
        id: id of the record, or its place in the JSON, such as `$.annotations[3]`.
        why: what is wrong and what to do: a sentence, or a predicate of the file.
    """

    file: str
    id: Any
    why: str

    def text(self) -> str:
        """File, record and what is wrong, in one line without full stop."""
        if self.id is None:
            colon = "" if self.why.startswith(_PREDICATES) else ":"
            return f"{self.file}{colon} {self.why}"
        return f"{self.file}, {self.id}: {self.why}"


# Warnings that this process has logged.
_logged: set[Finding] = set()


@dataclass
class Findings:
    """What a reader found.

    Attributes:
        problems: mistakes that training or evaluation refuses.
        warnings: irregularities that may be intended.
    """

    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    _missing: set[Finding] = field(default_factory=set)

    def problem(self, file: str, id: Any, why: str, *, is_missing: bool = False) -> None:
        """Add a problem.

        Args:
            file, id, why: see `Finding`.
            is_missing: whether it is that a file does not exist.
        """
        finding = Finding(file, id, why)
        self.problems.append(finding)
        if is_missing:
            self._missing.add(finding)

    def warn(self, file: str, id: Any, why: str) -> None:
        self.warnings.append(Finding(file, id, why))

    def extend(self, others: "Findings") -> None:
        """Add those of another reader."""
        self.problems += others.problems
        self.warnings += others.warnings
        self._missing |= others._missing

    def raise_first(self, name: str | None = None, hint: str = "", *, is_data: bool = True) -> None:
        """Raise the first problem, if any, as an error with one line.

        Args:
            name: of the data set, if known.
            hint: what else to say at the end, such as how to get the data.
            is_data: whether they are about a data set, so that the check lists all.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: any other problem.
        """
        if not self.problems:
            return
        first = self.problems[0]
        owner = f"Data set {name!r} cannot be used: " if name else ""
        text = f"{owner}{first.text()}."
        if len(self.problems) > 1:
            command = f"`tools/check_dataset.py {name}`" if name else "`tools/check_dataset.py`"
            text += f" There are {len(self.problems)} problems"
            text += f"; {command} lists all." if is_data else "."
        raise (FileNotFoundError if first in self._missing else ValueError)(text + hint)

    def log(self, name: str | None = None) -> None:
        """Log the warnings, the first ten in full, and each once, however often a file is read."""
        logger = logging.getLogger(__name__)
        new = [warning for warning in self.warnings if warning not in _logged]
        _logged.update(new)
        for file, id, why in new[:_NUM_LOGGED]:
            logger.warning(f"{file}{'' if id is None else f', {id}'}: {why}")
        if len(new) > _NUM_LOGGED:
            command = f"; `tools/check_dataset.py {name}` lists all" if name else ""
            logger.warning(f"... and {len(new) - _NUM_LOGGED} more warnings{command}")
