"""The bucket: how it is addressed, who we are to it, and the few requests that we make."""
