"""The endpoints of one judge: one address or several, and whether several serve the same before anything is paid."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from almost_eval.errors import InputError, did_you_mean
from almost_eval.judge.api.endpoint import JudgeEndpoint
from almost_eval.models.endpoints import BASE_URL, KEYS, OPENAI, EndpointAddress

LONGEST_LOOK = 30.0
"""Seconds that an endpoint may take to say what it serves."""


def judge_endpoints(judge: str, base_url: str | None, timeout: float) -> tuple[JudgeEndpoint, ...]:
    """Where a judge is reached: `base_url` is up to and including `/v1`, several by commas; None is `OPENAI_BASE_URL`,
    else OpenAI's.

    Raises:
        InputError: see `JudgeEndpoint`; or two addresses are the same.
    """
    urls = base_url or os.environ.get(BASE_URL) or OPENAI
    endpoints = tuple(JudgeEndpoint(judge, url.strip(), timeout) for url in urls.split(",") if url.strip())
    EndpointAddress.parse_all(urls, "--judge-base-url")  # after the first: these addresses hold nothing secret
    return endpoints


def serving_the_same(
    endpoints: Sequence[JudgeEndpoint], notice: Callable[[str], None], lost: list[str]
) -> tuple[JudgeEndpoint, ...]:
    """Those of several endpoints that answer; each serves the judge by its name, as far as it tells. Of one, the first
    review tells. The addresses of those that do not answer are added to `lost`.

    Raises:
        InputError: none answers, one refuses the key, or one serves no such judge.
    """
    import openai

    if len(endpoints) == 1:
        return tuple(endpoints)
    reached: list[JudgeEndpoint] = []
    problems: dict[str, str] = {}
    for endpoint in endpoints:
        shown = endpoint.base_url
        try:
            with endpoint.connect_blocking(min(endpoint.timeout, LONGEST_LOOK)) as client:
                names = [str(entry.id) for entry in client.models.list().data or []]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise InputError(
                f"the endpoint {shown} refuses the key ({error.status_code}); check {KEYS[0]} or {KEYS[1]}"
            ) from None
        except openai.APITimeoutError:
            problems[shown] = "did not answer in time"
        except openai.APIConnectionError:
            problems[shown] = "is not reachable"
        except openai.InternalServerError as error:
            problems[shown] = f"answers {error.status_code}"
        except (openai.OpenAIError, AttributeError, TypeError, ValueError):
            reached.append(endpoint)  # it lists nothing readable: its first review tells
        else:
            if names and endpoint.judge not in names:
                raise InputError(
                    f"the endpoint {shown} serves no judge {endpoint.judge!r}; {did_you_mean(endpoint.judge, names)}"
                )
            reached.append(endpoint)
    if not reached:
        shown, problem = next(iter(problems.items()))
        raise InputError(
            f"none of the {len(endpoints)} endpoints answers, the first: {shown} {problem}; start it, or check "
            "--judge-base-url"
        )
    for shown, problem in problems.items():
        lost.append(shown)
        notice(f"the endpoint {shown} {problem}; the run goes on with the other {len(reached)}")
    return tuple(reached)
