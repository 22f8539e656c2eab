"""Packages that an extra of this distribution brings: what to say where one is missing."""


def missing(needs: str, extra: str, instead: str = "") -> str:
    """The message for a missing package: who needs what, and how to install it.

    Args:
        needs: a clause such as "videos need imageio-ffmpeg".
        extra: name of the extra that brings it.
        instead: what goes without it, such as "leave it off".
    """
    advice = [
        f"in a clone of elit: pip install -c constraints.txt -e '.[{extra}]'",
        f"where elit came from PyPI: pip install 'elit-diffusion[{extra}]'",
    ]
    return "; ".join([needs, *advice, *([f"or {instead}"] if instead else [])])
