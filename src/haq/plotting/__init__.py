"""Pictures of what quantizing did to each layer, of how experts are chosen, and of both lanes.

They need matplotlib, which haq does not install. Every function returns a
`matplotlib.figure.Figure`: ``figure.savefig("errors.png")`` writes it, and as the last line of a
notebook's cell it shows itself. They can be told apart without colours, too.
"""

from haq.plotting.channels import plot_channels
from haq.plotting.errors import plot_errors
from haq.plotting.lanes import plot_lanes
from haq.plotting.routing import plot_routing, plot_transitions

__all__ = ["plot_channels", "plot_errors", "plot_lanes", "plot_routing", "plot_transitions"]
