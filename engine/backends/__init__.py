"""How the model is spread over processes: DeepSpeed ZeRO, FSDP2, or not at all."""

from engine.backends.base import Backend, Blueprint

__all__ = ["Backend", "Blueprint", "backend_class"]


def backend_class(name: str) -> type[Backend]:
    """The class behind the setting `backend`; DeepSpeed is imported only if it is asked for."""
    if name == "deepspeed":
        from engine.backends.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend
    if name == "fsdp":
        from engine.backends.fsdp import FSDPBackend

        return FSDPBackend
    from engine.backends.plain import PlainBackend

    return PlainBackend
