"""Where all pictures begin: matplotlib without a screen, or a sentence."""

from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing into files.

    Raises:
        ImportError: without matplotlib (`pip install matplotlib scipy`).
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: pip install matplotlib scipy") from error
    return plt
