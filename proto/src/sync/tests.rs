//! Seeded schedules over an in-memory pair.
