"""Many cases of a kind as one test."""


def all_hold(check, cases):
    """Calls check(*case) for each, and fails with all cases that do not hold."""
    failed = []
    for case in cases:
        try:
            check(*case)
        except Exception as error:
            failed.append(f"{case!r:.200}: {type(error).__name__}: {error!s:.300}")
    assert not failed, "\n".join(failed)
