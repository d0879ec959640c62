def launch(*a, **k):
    raise NotImplementedError


def allow_clusters(f, c):
    pass
