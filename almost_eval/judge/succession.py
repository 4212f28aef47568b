"""One judge in the place of another: both are checked on the same cases, and a certificate says what changes.

The new judge's run is in the folder itself, that of the old one in `old/` inside it, so that an old judge can be named
later and nothing is asked twice. `certificate.json` is what both say; the page is drawn of it.
"""

from __future__ import annotations

from pathlib import Path

from almost_eval.errors import RunError
from almost_eval.files import read_json, write_json
from almost_eval.judge.certificate import between, moves_between, sentence
from almost_eval.judge.check import JudgeCheck
from almost_eval.progress import Progress
from almost_eval.types import JSONMapping, JSONObject

FILE = "certificate.json"
OLD = "old"
"""Name of the folder of the judge that is replaced."""


def certify(new: JudgeCheck, old: JudgeCheck | None, folder: Path, progress: Progress | None = None) -> JSONObject:
    """Judge what is missing, then write `certificate.json` and return its content. `folder` is of the new judge's run;
    `old` is None where the archive is all there is to compare with.

    Raises:
        StoreError: see `JudgeCheck.execute`.
        InputError: see `JudgeCheck.execute`.
        RunError: the certificate cannot be written.
    """
    results = new.execute(folder, progress)
    certificate = certificate_of(results)
    if old is not None:
        theirs = old.execute(folder / OLD, progress)
        certificate |= {"old": old.judge.name}
        certificate["results"][OLD] = theirs
        if results["validity"]["passed"] and theirs["validity"]["passed"]:
            both = new.stored(folder), old.stored(folder / OLD)
            moves = moves_between(*both, seed=new.seed)
            certificate["between"] = {name: metric.to_dict() for name, metric in between(*both, seed=new.seed).items()}
            certificate["moves"] = [move.to_dict() for move in moves]
            certificate["sentences"] = [
                *(sentence(move, new.judge.name, old.judge.name) for move in moves),
                *certificate["sentences"],
            ]
    try:
        write_json(folder / FILE, certificate)
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}); the reviews are kept") from None
    return certificate


def certificate_of(results: JSONMapping) -> JSONObject:
    """What one check says, as a certificate without an old judge; results of an earlier version have no moves and no
    price.
    """
    known = results["provenance"].get("archive_judge", "GPT-4")
    return {
        "new": results["model"],
        "old": None,
        "archive_judge": known if "kappa" in results["metrics"] else None,
        "sentences": list(results["judging"].get("sentences", ())),
        "results": {"new": results},
        "between": None,
        "moves": None,
    }


def stored_certificate(results: JSONMapping, folder: Path | None) -> JSONObject:
    """The certificate that stands in the folder of a check, or what its results alone say."""
    file = folder / FILE if folder else None
    stored: JSONObject = read_json(file) if file and file.is_file() else certificate_of(results)
    return stored
