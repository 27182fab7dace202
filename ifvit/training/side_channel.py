"""Where the side channel was before evaluation needed it, too."""

from ifvit.side_channel import SideChannel as SideChannel
