//! What ranks tell each other beside the operations of the group, as bytes.

/// Bytes of a message: kind, rank, two numbers, length of the text, text.
pub(super) const LENGTH: usize = 512;
const HEAD: usize = 1 + 4 + 8 + 8 + 2;

/// What ranks tell each other.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Message {
    /// Is anybody there, and what was your operation of this number?
    Call(u64),
    /// Yes.
    Here(Here),
    /// This rank goes.
    Left(Left),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Here {
    /// Operations that have begun there.
    pub(super) entered: u64,
    /// The number that was asked for, and what this operation was; empty if it has not begun, or is forgotten.
    pub(super) number: u64,
    pub(super) operation: String,
}

/// How a rank has left.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Left {
    /// Operations that it has completed.
    pub(super) completed: u64,
    /// Where it began.
    pub(super) culprit: usize,
    /// Whether all its work was done, as far as it knows.
    pub(super) in_peace: bool,
    pub(super) reason: String,
}

impl Message {
    /// At most [`LENGTH`] bytes; a text that is too long is cut between characters.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let (kind, rank, counts, text) = match self {
            Self::Call(number) => (0, 0, [*number, 0], ""),
            Self::Here(here) => (1, 0, [here.entered, here.number], &*here.operation),
            Self::Left(left) => {
                let kind = 2 + u8::from(left.in_peace);
                (kind, left.culprit, [left.completed, 0], &*left.reason)
            }
        };
        let most = LENGTH - HEAD;
        let end = (0..=most.min(text.len()))
            .rev()
            .find(|&i| text.is_char_boundary(i));
        let text = &text.as_bytes()[..end.unwrap_or(0)];
        let mut bytes = vec![kind];
        bytes.extend((rank as u32).to_le_bytes());
        bytes.extend(counts.iter().flat_map(|count| count.to_le_bytes()));
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text);
        bytes.resize(LENGTH, 0);
        bytes
    }

    /// `None` for what is no message.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (head, text) = bytes.split_at_checked(HEAD)?;
        let rank = u32::from_le_bytes(head[1..5].try_into().ok()?);
        let count = u64::from_le_bytes(head[5..13].try_into().ok()?);
        let number = u64::from_le_bytes(head[13..21].try_into().ok()?);
        let length = u16::from_le_bytes(head[21..23].try_into().ok()?);
        let text = String::from_utf8_lossy(text.get(..usize::from(length))?).into_owned();
        match head[0] {
            0 => Some(Self::Call(count)),
            1 => Some(Self::Here(Here {
                entered: count,
                number,
                operation: text,
            })),
            kind @ (2 | 3) => Some(Self::Left(Left {
                completed: count,
                culprit: rank as usize,
                in_peace: kind == 3,
                reason: text,
            })),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_sent_and_a_long_reason_is_cut_between_characters() {
        let left = |reason: String, in_peace| {
            Message::Left(Left {
                completed: 1 << 40,
                culprit: 70_000,
                in_peace,
                reason,
            })
        };
        let here = Message::Here(Here {
            entered: 1 << 50,
            number: 1 << 45,
            operation: "a sum of 3 f32".into(),
        });
        let [error, peace] = [false, true].map(|in_peace| left("a reason".into(), in_peace));
        for message in [Message::Call(7), here, error, peace] {
            assert_eq!(Message::from_bytes(&message.to_bytes()), Some(message));
        }
        let long = left("ä".repeat(400), false).to_bytes();
        assert_eq!(long.len(), LENGTH);
        let cut = left("ä".repeat((LENGTH - HEAD) / 2), false);
        assert_eq!(Message::from_bytes(&long), Some(cut));
        assert_eq!(Message::from_bytes(&[9; LENGTH]), None);
        assert_eq!(Message::from_bytes(&[0; 3]), None);
    }
}
