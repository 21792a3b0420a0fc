"""Int8 weights and activations for language models of `transformers`, with almost no loss.

    model = haq.quantize_model(model, haq.calibration_batches(tokenizer, "wikitext2"))

Letters for shapes, everywhere: T tokens, K in-features, N out-features, D hidden size, B batch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from haq.arrivals import when_imported
from haq.version import own_version

__version__ = own_version()

if TYPE_CHECKING:
    from haq.public import *  # noqa: F403 - all that there is
    from haq.public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """The public names, all of them when the first one is used.

        They need the modelling code of `transformers`, which takes a second and more to import.
        Until then ``import haq`` costs next to nothing.
        """
        # What else Python looks for (`__path__`, `__wrapped__`) must not import all that.
        if name == "__all__" or not name.startswith("_"):
            public = import_module("haq.public")
            names = {"__all__": public.__all__}
            names |= {each: getattr(public, each) for each in public.__all__}
            globals().update(names)
            if name in names:
                return names[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *import_module("haq.public").__all__})


def _register() -> None:
    import_module("haq.checkpoint.plain").register()


# The registry of quantizers comes with the modelling code, and gets its entry as soon as it does.
when_imported("transformers.quantizers.auto", _register)
