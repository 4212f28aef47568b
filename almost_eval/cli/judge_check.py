"""What `almost-eval judge check` does: one judge or two from the flags, their run, the table and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from almost_eval.cli.command_line import open_console, print_json
from almost_eval.cli.judge_options import Flags, find_data_of, find_questions_of, open_judges_of
from almost_eval.cli.options import show_plan
from almost_eval.errors import InputError
from almost_eval.judge.build import JudgeOptions, without_api
from almost_eval.judge.families import DEFAULT_FAMILY
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from almost_eval.data.sources import DataSource
    from almost_eval.judge.cases import HumanVote
    from almost_eval.judge.check import JudgeCheck
    from almost_eval.judge.records import Question


def check_judges(archive: Sequence[Path], flags: Flags, as_json: bool) -> int:
    """Run the checks that the flags ask for, and show the certificate; the exit code."""
    from almost_eval.judge.check import OLD, certify
    from almost_eval.progress import progress_for

    names = flags["judge"]
    _refuse(names, archive, flags["votes"])
    votes = _human_votes(flags["votes"])
    if archive:
        opened = find_questions_of({**flags, "limit": None, "judges": names[:1]})
    else:  # the votes hold their questions
        opened = _data_for({**flags, "judges": names}, votes[0])
    new, *others = _checks(archive, flags, opened, votes)
    old = others[0] if others else None
    folder = flags["output"] or new.default_folder()
    if flags["dry_run"]:
        plan = new.describe(folder)
        return show_plan({"new": plan, OLD: old.describe(folder / OLD)} if old else plan, as_json=as_json)
    from almost_eval.report.certificate import write_certificate

    certificate = certify(new, old, folder, progress_for())
    write_certificate(certificate, folder)
    _show(certificate, folder, as_json)
    return 0 if all(results["validity"]["passed"] for results in certificate["results"].values()) else 3


def _refuse(judges: Sequence[str], archive: Sequence[Path], votes: Path | None) -> None:
    if not judges:
        raise InputError("--judge is missing: name a model of the API (gpt-6.1-terra), or reward:CKPT")
    if len(judges) > 2 or len(set(judges)) < len(judges):
        raise InputError(f"--judge is there for {', '.join(judges)}; name the new judge, then one other to replace")
    if not archive and votes is None:
        raise InputError("nothing to compare with: give --archive with archived reviews, --votes of people, or both")


def _checks(
    archive: Sequence[Path],
    flags: Flags,
    opened: tuple[DataSource, list[Question], str],
    votes: tuple[list[HumanVote], dict[str, int]],
) -> list[JudgeCheck]:
    """The check of the first judge and, where one is named, that of the one to be replaced."""
    from almost_eval.judge.cases import find_archives
    from almost_eval.judge.check import JudgeCheck
    from almost_eval.judge.prompts import load_judge_prompts

    names = flags["judge"]
    data, questions, fingerprint = opened
    archives = find_archives(archive, questions)
    reader = load_judge_prompts(DEFAULT_FAMILY, "builtin", data)
    checks = []
    for name, address in zip(names, _addresses(names, flags["judge_base_url"]), strict=True):
        mine = {**flags, "judge": name, "judges": [name], "judge_base_url": address}
        if len(names) > 1 and JudgeOptions(judge=name).is_local:  # these flags are the other judge's
            mine |= without_api()
        checks.append(
            JudgeCheck(
                archives,
                reader,
                open_judges_of(mine, data),
                fingerprint,
                votes=votes[0],
                unread_votes=votes[1],
                archive_judge=flags["archive_judge"],
                orders=flags["orders"],
                limit=flags["limit"],
                repeats=flags["repeats"],
                seed=flags["seed"],
            )
        )
    return checks


def _data_for(flags: Flags, votes: Sequence[HumanVote]) -> tuple[DataSource, list[Question], str]:
    """Where prompts come from, no questions, and the digest of the votes."""
    from almost_eval.data.sources import fingerprint

    if flags["questions"] is not None:
        raise InputError("--questions belong to --archive; the file of --votes holds its own")
    return find_data_of(flags), [], fingerprint([asdict(vote) for vote in votes])


def _human_votes(file: Path | None) -> tuple[list[HumanVote], dict[str, int]]:
    if file is None:
        return [], {}
    from almost_eval.arena.human import read_human_votes

    return read_human_votes(file)


def _addresses(judges: Sequence[str], addresses: Sequence[str]) -> list[str | None]:
    """The endpoints of each judge: of one behind an API all; of two one is for both, two are in the judges' order."""
    behind = [name for name in judges if not JudgeOptions(judge=name).is_local]
    if not behind and addresses:
        behind = [*judges[:1]]  # `open_judge` refuses it, with the judge's name
    if len(behind) == 1:
        addresses = [",".join(addresses)] if addresses else []
    if len(addresses) > max(1, len(behind)):
        raise InputError(
            f"--judge-base-url is there {len(addresses)} times for {len(behind)} judges behind an API; give one for "
            "both, or one for each, several endpoints of one by commas"
        )
    shared = list(addresses) * (len(behind) if len(addresses) == 1 else 1)
    each = dict(zip(behind, shared, strict=False))
    return [each.get(name) for name in judges]


def _show(certificate: JSONObject, folder: Path, as_json: bool) -> None:
    """`results.json` of the new judge with the certificate in it, or the table."""
    if not as_json:
        from almost_eval.report.console import print_results

        print_results(certificate["results"]["new"], open_console(), folder=str(folder))
        click.echo(f"page: {folder / 'certificate.html'}", err=True)
        return
    others = {name: results for name, results in certificate["results"].items() if name != "new"}
    rest = {**certificate, "results": others}
    print_json({**certificate["results"]["new"], "certificate": rest})
