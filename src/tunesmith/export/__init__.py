"""What a run made, in the layouts that other programs load: merged or as an adapter, checked before it is kept."""
