//! Values that people write: times and sizes, with their units, the same in every option.

use std::{ops::RangeInclusive, str::FromStr, time::Duration};

/// A time as in `500ms`, `90s`, `10m`, `2h` or `1d`; a number alone is seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time(Duration);

impl From<Time> for Duration {
    fn from(time: Time) -> Self {
        time.0
    }
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is not a time; write it like 500ms, 90s, 10m, 2h or 1d");
        let (digits, unit) = split(text);
        let millis = match unit {
            "ms" => 1,
            "s" | "" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(error()),
        };
        let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(millis));
        number.map(|millis| Self(Duration::from_millis(millis))).ok_or_else(error)
    }
}

/// A count as in `65536`, `64k` or `1M`, which are 1024 and 1024 times 1024.
///
/// # Errors
/// It is none, or out of range.
pub fn count(text: &str, range: RangeInclusive<u32>) -> Result<u32, String> {
    let error = || format!("{text:?} is not a number; write it like 65536, 64k or 1M");
    let (digits, unit) = split(text);
    let factor = match unit {
        "" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        _ => return Err(error()),
    };
    let number =
        digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(error)?;
    let number = u32::try_from(number).ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("it may be from {} to {}", range.start(), range.end()))
}

fn split(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_nonsense_is_refused() {
        let times = [
            ("500ms", 500),
            ("90", 90_000),
            ("90s", 90_000),
            ("10m", 600_000),
            ("2h", 7_200_000),
            ("1d", 86_400_000),
        ];
        for (text, millis) in times {
            assert_eq!(text.parse(), Ok(Time(Duration::from_millis(millis))), "{text}");
        }
        for bad in ["", "s", "-1s", "soon", "1w", "99999999999999999999", "1.5s"] {
            assert!(bad.parse::<Time>().is_err(), "{bad}");
        }
    }

    #[test]
    fn counts_are_read_and_nonsense_is_refused() {
        let read = |text| count(text, 1..=1 << 20);
        assert_eq!(read("1000"), Ok(1_000));
        assert_eq!(read("64k"), Ok(65_536));
        assert_eq!(read("1M"), Ok(1_048_576));
        assert!(read("2M").unwrap_err().contains("from 1 to 1048576"));
        for bad in ["", "0", "M", "1G", "-1", "many"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
