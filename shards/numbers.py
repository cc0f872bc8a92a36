"""Numbers as a person reads them: counts, bytes and times in the unit that fits."""


def thousands(number: float) -> tuple[str, str]:
    """Three digits and the thousands they count: 854.4e6 is "854" and "M"."""
    prefixes = ["", "k", "M", "G", "T"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.{0 if number >= 99.95 else 1}f}", prefixes[0]


def count(number: float) -> str:
    """A count of tokens or steps as the field prints it: 854k, 2.0B."""
    return "".join(thousands(number)).replace("G", "B")


def size(nbytes: float) -> str:
    """Bytes in the unit that fits, of 1,000 each: 1.8 kB, 50.2 MB, 12.3 GB."""
    return "{} {}B".format(*thousands(nbytes)) if nbytes >= 1000 else f"{nbytes:.0f} bytes"


def plural(number: int, what: str) -> str:
    """1 part, 3 parts."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
