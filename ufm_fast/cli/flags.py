"""The flags of a command, made from the table of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import typer

from ufm_fast.runs.options import Setting


def with_flags(settings: Iterable[Setting]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes ``**given`` one option for each setting; a flag that was not given
    arrives as None.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        parameters = [
            p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        for setting in settings:
            option = typer.Option(None, _option(setting), help=_help(setting), show_default=False)
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(
                inspect.Parameter(
                    setting.name, kind, default=option, annotation=_kind(setting) | None
                )
            )
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _option(setting: Setting) -> str:
    dashed = setting.name.replace("_", "-")
    return f"--{dashed}/--no-{dashed}" if setting.kind is bool else f"--{dashed}"


def _kind(setting: Setting) -> type:
    return str if setting.several else setting.kind


def _help(setting: Setting) -> str:
    plain = setting.default is None or setting.kind is bool
    return setting.help if plain else f"{setting.help} (default {setting.default})"
