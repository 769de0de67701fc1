//! What TCP segments say of a connection's state (RFC 9293). No table and no clock here: the state goes in and comes out.

use super::line::{ANSWERED, CLIENT_FIN, ESTABLISHED, RESET, TASK_FIN};

/// How far a sequence number may be ahead of what was seen to be taken for what follows a loss, in bytes: more than a
/// connection has under way.
pub const WINDOW: u32 = 1 << 24;

/// What is said of a packet's place in its connection (RFC 9293, 3.4); all in host order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Sequence number of its first byte.
    pub sequence: u32,
    /// What it acknowledges, if it does.
    pub acknowledgment: u32,
    /// Bytes of payload.
    pub payload: u32,
    /// [`SYN`], [`ACK`], [`RST`], [`FIN`].
    pub flags: u8,
}

/// FIN, of the TCP flags (RFC 9293, 3.1).
pub const FIN: u8 = 1;
/// SYN.
pub const SYN: u8 = 2;
/// RST.
pub const RST: u8 = 4;
/// ACK.
pub const ACK: u8 = 16;

impl Segment {
    /// Whether it has all of these flags.
    #[inline(always)]
    const fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// The sequence number after it: SYN and FIN count as a byte each.
    #[inline(always)]
    pub const fn end(&self) -> u32 {
        let marks = ((self.flags & SYN) >> 1) + (self.flags & FIN);
        self.sequence.wrapping_add(self.payload).wrapping_add(marks as u32)
    }
}

/// The most data that comes with a SYN (TCP Fast Open, RFC 7413), in bytes: one packet's.
const SYN_DATA: u32 = 9_000;

/// Whether `number` lies behind `start`, at most [`WINDOW`] away.
#[inline(always)]
const fn ahead(number: u32, start: u32) -> bool {
    let distance = number.wrapping_sub(start);
    distance != 0 && distance <= WINDOW
}

/// How far both sides have come: the sequence number of each side's next byte, as far as its packets were seen in order; host
/// order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Numbers {
    /// The client's.
    pub client_next: u32,
    /// The task's.
    pub task_next: u32,
}

impl Numbers {
    /// Notes what a segment of the client says; the state after it. What is not plausible changes nothing: a forged RST or FIN
    /// must not close a connection (RFC 5961).
    ///
    /// `one_way` says that the task's replies do not pass here.
    #[inline(always)]
    #[must_use]
    pub fn client_sent(&mut self, mut state: u32, segment: &Segment, one_way: bool) -> u32 {
        // A reset is believed at the one number that its receiver takes at once (RFC 5961, 3.2).
        if segment.has(RST) {
            if segment.sequence == self.client_next {
                state |= RESET;
            }
            return state;
        }
        let end = segment.end();
        if segment.sequence == self.client_next && end != self.client_next {
            self.client_next = end;
        }
        if segment.has(FIN) && end == self.client_next {
            state |= CLIENT_FIN;
        }
        let answers = if one_way {
            segment.sequence == self.client_next
        } else {
            state & ANSWERED != 0 && segment.acknowledgment == self.task_next
        };
        if segment.flags & (SYN | ACK) == ACK && (answers || one_way && end == self.client_next) {
            state |= ESTABLISHED;
        }
        state
    }

    /// The same of the task. It may be ahead of what was seen: a segment was lost before it came here. What it
    /// acknowledges tells how far the client is, where a segment was lost or overtaken.
    #[inline(always)]
    #[must_use]
    pub fn task_sent(&mut self, mut state: u32, segment: &Segment) -> u32 {
        if state & ANSWERED == 0 {
            // Whatever answers a SYN acknowledges it (RFC 9293, 3.10.7.3), and data that came with it or not. Where the
            // line was made anew the task goes on from where the client has seen it.
            let acknowledged = segment.acknowledgment.wrapping_sub(self.client_next);
            if segment.has(ACK) && acknowledged <= SYN_DATA {
                self.client_next = segment.acknowledgment;
                self.task_next = segment.end();
                state |= if segment.has(RST) { RESET } else { ANSWERED };
            } else if self.task_next != 0 && segment.sequence.wrapping_sub(self.task_next) <= WINDOW {
                self.task_next = segment.end();
                state |= if segment.has(RST) { RESET } else { ANSWERED };
            }
            return state;
        }
        if segment.has(RST) {
            if segment.sequence == self.task_next {
                state |= RESET;
            }
            return state;
        }
        let end = segment.end();
        if ahead(end, self.task_next) {
            self.task_next = end;
        }
        if segment.has(ACK) && ahead(segment.acknowledgment, self.client_next) {
            self.client_next = segment.acknowledgment;
        }
        if segment.has(FIN) && end == self.task_next {
            state |= TASK_FIN;
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: u32 = u32::MAX - 2;
    const TASK: u32 = 5_000;

    /// A state and what belongs to it; what is noted says whether the state changed.
    struct Connection {
        state: u32,
        numbers: Numbers,
    }

    impl Connection {
        fn set(&mut self, state: u32) -> bool {
            core::mem::replace(&mut self.state, state) != state
        }

        fn client_sent(&mut self, segment: &Segment, one_way: bool) -> bool {
            let state = self.numbers.client_sent(self.state, segment, one_way);
            self.set(state)
        }

        fn task_sent(&mut self, segment: &Segment) -> bool {
            let state = self.numbers.task_sent(self.state, segment);
            self.set(state)
        }

        fn is_established(&self) -> bool {
            self.state & (ESTABLISHED | CLIENT_FIN | TASK_FIN | RESET) == ESTABLISHED
        }

        fn closing(&self) -> bool {
            self.state & (CLIENT_FIN | TASK_FIN | RESET) != 0
        }
    }

    fn segment(flags: u8, sequence: u32, acknowledgment: u32, payload: u32) -> Segment {
        Segment { sequence, acknowledgment, payload, flags }
    }

    /// A connection after the client's SYN; its numbers turn around soon.
    fn opened() -> Connection {
        Connection { state: 0, numbers: Numbers { client_next: CLIENT.wrapping_add(1), task_next: 0 } }
    }

    /// A connection after the handshake.
    fn established() -> Connection {
        let mut connection = opened();
        assert!(connection.task_sent(&segment(SYN | ACK, TASK, CLIENT.wrapping_add(1), 0)));
        assert!(!connection.is_established());
        assert!(connection.client_sent(&segment(ACK, CLIENT.wrapping_add(1), TASK + 1, 0), false));
        assert!(connection.is_established());
        connection
    }

    #[test]
    fn a_handshake_establishes_and_only_the_right_numbers_do() {
        let connection = established();
        assert_eq!(
            (connection.numbers.client_next, connection.numbers.task_next),
            (CLIENT.wrapping_add(1), TASK + 1)
        );
        let mut connection = opened();
        // An acknowledgment of something else is an answer of something else.
        assert!(!connection.task_sent(&segment(SYN | ACK, TASK, 7_000_000, 0)));
        // Who sees no answers cannot go on after one.
        assert!(!connection.client_sent(&segment(ACK, CLIENT.wrapping_add(1), TASK + 1, 0), false));
        assert!(connection.task_sent(&segment(SYN | ACK, TASK, CLIENT.wrapping_add(1), 0)));
        for guess in [0, TASK, TASK + 2, u32::MAX] {
            assert!(
                !connection.client_sent(&segment(ACK, CLIENT.wrapping_add(1), guess, 0), false),
                "{guess}"
            );
        }
        assert!(!connection.is_established());
    }

    #[test]
    fn a_refusal_is_a_reset_without_an_answer() {
        let mut connection = opened();
        assert!(!connection.task_sent(&segment(RST | ACK, 0, 99_000, 0)));
        assert!(connection.task_sent(&segment(RST | ACK, 0, CLIENT.wrapping_add(1), 0)));
        assert_eq!(connection.state, RESET);
    }

    #[test]
    fn data_with_a_syn_is_counted_when_the_task_takes_it() {
        let mut connection = opened();
        assert!(connection.task_sent(&segment(SYN | ACK, TASK, CLIENT.wrapping_add(11), 0)));
        assert_eq!(connection.numbers.client_next, CLIENT.wrapping_add(11));
    }

    #[test]
    fn resets_and_ends_are_believed_at_their_number_alone() {
        let next = CLIENT.wrapping_add(1);
        for wrong in [0, next.wrapping_sub(1), next.wrapping_add(1), next.wrapping_add(1 << 31)] {
            let mut connection = established();
            assert!(!connection.client_sent(&segment(RST, wrong, 0, 0), false), "{wrong}");
            assert!(
                !connection.client_sent(&segment(FIN | ACK, wrong.wrapping_add(9), TASK + 1, 0), false),
                "{wrong}"
            );
            assert!(connection.is_established());
        }
        for wrong in [0, TASK, TASK + 2, TASK + 1 + (1 << 31)] {
            let mut connection = established();
            assert!(!connection.task_sent(&segment(RST, wrong, 0, 0)), "{wrong}");
        }
        let mut connection = established();
        assert!(connection.client_sent(&segment(RST, next, 0, 0), false));
        assert!(connection.closing());
        let mut connection = established();
        assert!(connection.task_sent(&segment(RST, TASK + 1, 0, 0)));
        assert!(connection.closing());
    }

    #[test]
    fn both_sides_close_in_any_order_and_at_once() {
        let next = CLIENT.wrapping_add(1);
        let from_client = segment(FIN | ACK, next, TASK + 1, 100);
        let from_task = segment(FIN | ACK, TASK + 1, next, 50);
        for client_first in [true, false] {
            let mut connection = established();
            if client_first {
                assert!(connection.client_sent(&from_client, false));
                assert!(connection.task_sent(&from_task));
            } else {
                assert!(connection.task_sent(&from_task));
                assert!(connection.client_sent(&from_client, false));
            }
            assert_eq!(connection.state & (CLIENT_FIN | TASK_FIN | RESET), CLIENT_FIN | TASK_FIN);
            // Sent again it changes nothing.
            assert!(!connection.client_sent(&from_client, false));
            assert!(!connection.task_sent(&from_task));
        }
    }

    #[test]
    fn what_was_lost_or_overtaken_before_it_came_here_heals() {
        let next = CLIENT.wrapping_add(1);
        let mut connection = established();
        // The client's second segment comes first, the first one after it.
        connection.client_sent(&segment(ACK, next.wrapping_add(100), TASK + 1, 100), false);
        assert_eq!(connection.numbers.client_next, next);
        connection.client_sent(&segment(ACK, next, TASK + 1, 100), false);
        assert_eq!(connection.numbers.client_next, next.wrapping_add(100));
        // The task's acknowledgment tells of both.
        connection.task_sent(&segment(ACK, TASK + 1, next.wrapping_add(200), 0));
        assert_eq!(connection.numbers.client_next, next.wrapping_add(200));
        assert!(connection.client_sent(&segment(FIN | ACK, next.wrapping_add(200), TASK + 1, 0), false));
        // A segment of the task that did not come this way.
        connection.task_sent(&segment(ACK, TASK + 1_001, next.wrapping_add(201), 100));
        assert_eq!(connection.numbers.task_next, TASK + 1_101);
        assert!(connection.task_sent(&segment(RST | ACK, TASK + 1_101, 0, 0)));
    }

    #[test]
    fn an_entry_made_anew_in_the_middle_goes_on() {
        let mut connection = Connection { state: 0, numbers: Numbers { client_next: 300, task_next: 900 } };
        // Ahead of what the client had when it sent that: data is under way.
        assert!(connection.task_sent(&segment(ACK, 2_900, 100, 1_000)));
        assert_eq!((connection.state, connection.numbers.task_next), (ANSWERED, 3_900));
        assert!(!connection.client_sent(&segment(ACK, 300, 2_900, 0), false));
        assert!(connection.client_sent(&segment(ACK, 300, 3_900, 0), false));
        assert!(connection.is_established());
    }

    #[test]
    fn where_answers_go_elsewhere_the_client_alone_establishes() {
        let mut connection = opened();
        let next = CLIENT.wrapping_add(1);
        assert!(!connection.client_sent(&segment(ACK, next.wrapping_add(1), TASK + 1, 0), true));
        assert!(connection.client_sent(&segment(ACK, next, TASK + 1, 10), true));
        assert_eq!(
            (connection.is_established(), connection.numbers.client_next),
            (true, next.wrapping_add(10))
        );
    }
}
