"""Every interval of the transfer protocol, derived from the configured timers.

sender    Hello, Begin, Close,     every resend_s until answered
          Fetch
          Progress                 every progress_s while a ticket is held
receiver  Waiting                  at the next tick, if a Begin has no other answer by then
          Renew                    every renew_s while a grant is open; it also shows within
                                   that time that a connection is closed
both      a lost connection        may come back within grace_s
"""

from dataclasses import dataclass

from common.config import TimerConfig


@dataclass(frozen=True, slots=True)
class Timers:
    """All in seconds."""

    resend_s: float
    progress_s: float
    renew_s: float
    stall_s: float
    lease_s: float
    grace_s: float
    connect_s: float
    """A peer that was never reached is given up after this."""
    tombstone_s: float = 60.0
    """How long the end of a transfer is remembered, to answer late messages."""
    idle_s: float = 60.0
    """A link without transfers is closed after this."""

    @staticmethod
    def of(config: TimerConfig) -> "Timers":
        return Timers(
            resend_s=min(0.5, config.stall_s / 4),
            progress_s=min(config.heartbeat_s, config.stall_s / 4),
            renew_s=min(config.heartbeat_s, config.lease_s / 3),
            stall_s=config.stall_s,
            lease_s=config.lease_s,
            grace_s=1.5 * config.heartbeat_s,
            connect_s=config.heartbeat_s * config.dead_after,
        )
