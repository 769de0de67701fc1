//! How long a connection may be silent: each phase of its life has a timer.

use super::line::{ANSWERED, CLIENT_FIN, Control, ESTABLISHED, RESET, TASK_FIN, UDP};
use crate::{pod, verifier::opaque};

/// Jiffies from `then` to `now`, both their low 32 bits; none if another CPU has noted `then` after `now` was read, up to 65,536
/// later (65 s at 1,000 Hz): a walk over a table reads the clock once. After as long as the clock takes to turn (49 days at
/// 1,000 Hz) what is that old looks new for as long.
#[inline(always)]
pub const fn elapsed(then: u32, now: u32) -> u32 {
    let elapsed = now.wrapping_sub(then);
    if elapsed >> 16 == 0xffff { 0 } else { elapsed }
}

/// Jiffies by which another CPU's clock may be ahead.
const SKEW: u32 = 64;

/// Seconds for which Linux remembers a connection that its own side closed first (`TCP_TIMEWAIT_LEN`, `include/net/tcp.h`). A SYN
/// for the same pair is taken for a new connection only if its numbers look newer than the last one's (RFC 6191): from one host,
/// through another listener, they may look older.
pub const TIME_WAIT: u32 = 60;

/// Whether `then` lies not further back than so many jiffies. For what nobody takes away when it is over:
/// unlike with [`elapsed`], what the clock has turned since looks new for a moment only. Not for who has read `now` a while ago.
#[inline(always)]
pub const fn is_within(then: u32, now: u32, jiffies: u32) -> bool {
    now.wrapping_sub(then).wrapping_add(SKEW) <= jiffies.saturating_add(SKEW)
}

/// In which part of its life a connection is.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// TCP, not established.
    HalfOpen = 0,
    /// TCP, established.
    Established = 1,
    /// TCP, and either side has begun to close.
    Closing = 2,
    /// UDP without a reply.
    OneWay = 4,
    /// UDP with replies.
    Answered = 5,
}

impl Phase {
    /// The number of the phase that a connection is in. Without a branch: the verifier would walk each of them.
    #[inline(always)]
    pub fn number_of(control: Control) -> u32 {
        let state = control.state();
        let any = |bits: u32| opaque((state & bits).wrapping_neg() as u64 >> 31 & 1) as u32;
        let (closing, established) = (any(CLIENT_FIN | TASK_FIN | RESET), any(ESTABLISHED));
        let (udp, answered) = (any(UDP), any(ANSWERED));
        let tcp = closing * Phase::Closing as u32 + (1 - closing) * established;
        udp * (Phase::OneWay as u32 + answered) + (1 - udp) * tcp
    }
}

impl TryFrom<u32> for Phase {
    type Error = u32;

    fn try_from(raw: u32) -> Result<Self, u32> {
        [Self::HalfOpen, Self::Established, Self::Closing, Self::OneWay, Self::Answered]
            .into_iter()
            .find(|phase| *phase as u32 == raw)
            .ok_or(raw)
    }
}

/// Seconds of silence after which a connection has ended, by [`Phase`]; those of a service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Timers {
    /// By the phase's discriminant; what stands for no phase is zero.
    pub seconds: [u32; 8],
}

impl Timers {
    /// What stands where nothing is set. Established: RFC 5382, REQ-5. UDP: RFC 4787, REQ-5 asks for two minutes at
    /// least where replies come, and recommends five.
    pub const DEFAULT: Self = Self { seconds: [30, 7440, 120, 0, 60, 300, 0, 0] };
    /// Less than this no timer may be, in seconds: shorter silences are not looked at.
    pub const LEAST: u32 = 3;
    /// More than this no timer may be, in seconds: the clock of connections turns around.
    pub const MOST: u32 = 1_000_000;

    /// The timer of a phase in seconds.
    #[inline(always)]
    pub const fn of(&self, phase: Phase) -> u32 {
        self.seconds[phase as usize]
    }

    /// Whether a connection in this state, last seen then, has been silent for longer than its timer. All times in
    /// jiffies, low 32 bits.
    #[inline(always)]
    pub fn expired(&self, control: Control, seen: u32, now: u32, jiffies_per_second: u32) -> bool {
        // The compiler knows that no phase is as high, and would take the mask away that tells the verifier.
        let phase = opaque(Phase::number_of(control).into()) as usize & 7;
        elapsed(seen, now) > self.seconds[phase].wrapping_mul(jiffies_per_second)
    }
}

impl Default for Timers {
    fn default() -> Self {
        Self::DEFAULT
    }
}

const _: () = assert!(size_of::<Timers>() == 32);

pod!(Timers);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::line::OTHERS;

    #[test]
    fn each_phase_has_its_timer_and_the_clock_may_turn_around() {
        let timers = Timers::DEFAULT;
        let hz = 250;
        let cases = [
            (0, 30),
            (ANSWERED, 30),
            (ANSWERED | ESTABLISHED, 7440),
            (ANSWERED | ESTABLISHED | CLIENT_FIN, 120),
            (RESET | OTHERS, 120),
            (UDP, 60),
            (UDP | ANSWERED | ESTABLISHED, 300),
        ];
        for (state, seconds) in cases {
            let control = Control::default().with_state(state);
            assert_eq!(timers.of(Phase::number_of(control).try_into().unwrap()), seconds, "{state}");
            for seen in [0, u32::MAX - 100] {
                assert!(!timers.expired(control, seen, seen.wrapping_add(seconds * hz), hz), "{state}");
                assert!(timers.expired(control, seen, seen.wrapping_add(seconds * hz + 1), hz), "{state}");
                // Seen by another CPU after this one has read the clock.
                for ahead in [1, 60 * hz] {
                    assert!(!timers.expired(control, seen, seen.wrapping_sub(ahead), hz), "{state}");
                }
                // Nobody has looked for a month, or two and a half.
                for days in [25, 30, 75, 190] {
                    let later = seen.wrapping_add((days * 24 * 60 * 60_u32).wrapping_mul(hz));
                    assert!(timers.expired(control, seen, later, hz), "{state} after {days} days");
                }
            }
        }
    }
}
