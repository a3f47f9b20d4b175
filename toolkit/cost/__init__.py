"""Work times hardware gives seconds and bytes."""
