"""The pages of ``lcsc dashboard``, in one read-only server."""
