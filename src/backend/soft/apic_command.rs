//! Interrupt messages: what the interrupt command register and the IOAPIC send, and whether a local APIC is meant (Intel
//! SDM 3A, 11.6).

/// What a message does at its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// The vector's interrupt, at each destination.
    Fixed,
    /// The vector's interrupt, at the destination that does the least important work.
    LowestPriority,
    /// A non-maskable interrupt.
    Nmi,
    /// Nothing here: vCPUs start at their entry point (INIT, start-up), and there is no SMM.
    Ignored,
}

impl Delivery {
    /// The mode of bits 10–8 of a command or a redirection entry.
    pub fn from_bits(low: u32) -> Self {
        match low >> 8 & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            4 => Self::Nmi,
            _ => Self::Ignored,
        }
    }
}

/// Who is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// The one with this id, or all for the broadcast id.
    Physical(u32),
    /// Those whose logical id matches.
    Logical(u32),
    /// The sender.
    Itself,
    /// Everybody.
    All,
    /// Everybody but the sender.
    AllButItself,
}

/// One message on the bus between APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Vector.
    pub vector: u8,
    /// What it does.
    pub delivery: Delivery,
    /// Who is meant.
    pub destination: Destination,
    /// Ids are 32 bits wide, as an APIC in x2APIC mode sends them; else 8.
    pub is_wide: bool,
    /// Level-triggered: its end has to be told to the IOAPIC.
    pub is_level: bool,
}

impl Message {
    /// The message of an interrupt command. `high` is the destination, in the place that the mode gives it.
    pub fn from_command(low: u32, high: u32, is_wide: bool) -> Self {
        let id = if is_wide { high } else { high >> 24 };
        let destination = match low >> 18 & 3 {
            0 if low & LOGICAL != 0 => Destination::Logical(id),
            0 => Destination::Physical(id),
            1 => Destination::Itself,
            2 => Destination::All,
            _ => Destination::AllButItself,
        };
        // An inter-processor interrupt is edge-triggered whatever its trigger bit says (11.6.1).
        let [vector, ..] = low.to_le_bytes();
        Self { vector, delivery: Delivery::from_bits(low), destination, is_wide, is_level: false }
    }

    /// Whether it needs a vector, and has one that no interrupt can have.
    pub fn is_illegal(&self) -> bool {
        matches!(self.delivery, Delivery::Fixed | Delivery::LowestPriority) && self.vector < 16
    }
}

const LOGICAL: u32 = 1 << 11;
/// The destination format register's flat model.
const FLAT: u32 = 0xf;

/// How a local APIC is addressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Its id.
    pub id: u32,
    /// Its logical destination register.
    pub logical: u32,
    /// Its destination format register.
    pub format: u32,
    /// It is in x2APIC mode.
    pub is_x2apic: bool,
}

impl Address {
    /// Whether a message to `destination`, which names somebody, is for this APIC.
    pub fn is_meant(&self, destination: Destination, is_wide: bool) -> bool {
        match destination {
            Destination::Physical(id) => id == self.id || id == if is_wide { u32::MAX } else { 0xff },
            Destination::Logical(id) if self.is_x2apic => self.is_in_cluster(id, is_wide),
            Destination::Logical(id) => self.is_in_set(id, is_wide),
            Destination::All => true,
            Destination::Itself | Destination::AllButItself => false,
        }
    }

    fn is_in_cluster(&self, id: u32, is_wide: bool) -> bool {
        let broadcast = if is_wide { u32::MAX } else { 0xff };
        id == broadcast || (id >> 16 == self.logical >> 16 && id & self.logical & 0xffff != 0)
    }

    fn is_in_set(&self, id: u32, is_wide: bool) -> bool {
        if is_wide && id > 0xff {
            return id == u32::MAX;
        }
        let own = self.logical >> 24;
        if self.format >> 28 == FLAT {
            return own & id != 0;
        }
        let is_same_cluster = id >> 4 == 0xf || id >> 4 == own >> 4;
        is_same_cluster && own & id & 0xf != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xapic(id: u32, logical: u32, format: u32) -> Address {
        Address { id, logical: logical << 24, format, is_x2apic: false }
    }

    #[test]
    fn test_command_is_taken_apart() {
        let message = Message::from_command(0x0000_0841, 0x0300_0000, false);
        assert_eq!((message.vector, message.delivery), (0x41, Delivery::Fixed));
        assert_eq!(message.destination, Destination::Logical(3));
        assert_eq!(Message::from_command(0x30, 77, true).destination, Destination::Physical(77));
        for (shorthand, destination) in
            [(1, Destination::Itself), (2, Destination::All), (3, Destination::AllButItself)]
        {
            assert_eq!(Message::from_command(shorthand << 18, u32::MAX, true).destination, destination);
        }
        for (mode, delivery) in
            [(2, Delivery::Ignored), (4, Delivery::Nmi), (5, Delivery::Ignored), (6, Delivery::Ignored)]
        {
            assert_eq!(Message::from_command(mode << 8, 0, false).delivery, delivery);
        }
    }

    #[test]
    fn test_physical_destination_is_an_id_or_everybody() {
        let apic = xapic(2, 0, u32::MAX);
        for (id, is_wide, meant) in
            [(2, false, true), (3, false, false), (0xff, false, true), (0xff, true, false), (u32::MAX, true, true)]
        {
            assert_eq!(apic.is_meant(Destination::Physical(id), is_wide), meant, "{id:#x}");
        }
    }

    #[test]
    fn test_logical_destination_follows_the_format() {
        let flat = xapic(0, 0x04, u32::MAX);
        assert!(flat.is_meant(Destination::Logical(0x06), false) && !flat.is_meant(Destination::Logical(0x02), false));
        let cluster = xapic(0, 0x24, 0x0fff_ffff);
        for (id, meant) in [(0x24, true), (0x2f, true), (0x22, false), (0x34, false), (0xf4, true)] {
            assert_eq!(cluster.is_meant(Destination::Logical(id), false), meant, "{id:#x}");
        }
        let wide = Address { id: 17, logical: 1 << 16 | 2, format: u32::MAX, is_x2apic: true };
        for (id, meant) in
            [(1 << 16 | 2, true), (1 << 16 | 0xffff, true), (1 << 16 | 1, false), (2, false), (u32::MAX, true)]
        {
            assert_eq!(wide.is_meant(Destination::Logical(id), true), meant, "{id:#x}");
        }
    }

    #[test]
    fn test_vectors_of_exceptions_are_illegal() {
        assert!(Message::from_command(0x0f, 0, false).is_illegal());
        assert!(!Message::from_command(0x10, 0, false).is_illegal());
        assert!(!Message::from_command(0x400, 0, false).is_illegal(), "an NMI has no vector");
    }
}
