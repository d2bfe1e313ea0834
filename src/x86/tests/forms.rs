//! The counted table of instruction forms: every form of the known features, with random operands and state, by the
//! emulator and by the host's own CPU. `UHYVE_FORMS=docs/instruction-forms.md cargo test forms` writes the table.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{Code, EncodingKind, FlowControl};

use super::compare::{self, Compared};
use super::native::Native;
use super::{Random, inventory};
use crate::registers::RSI;
use crate::x86::decode;

/// Encodings of a form (operands in registers and in memory), and executions of each.
const ENCODINGS: usize = 24;
const ROUNDS: usize = 6;

/// How a form has fared.
#[derive(Default)]
struct Row {
    features: String,
    tried: usize,
    agreed: usize,
    /// Why some were not compared, the last reason.
    reason: &'static str,
    difference: Option<String>,
}

/// The encodings of each form.
fn forms() -> BTreeMap<String, (Code, String, Vec<Vec<u8>>)> {
    let wanted = inventory::features();
    let mut forms: BTreeMap<String, (Code, String, Vec<Vec<u8>>)> = BTreeMap::new();
    for bytes in inventory::encodings() {
        let Ok(instruction) = decode(&bytes, 0) else { continue };
        let is_wanted = instruction.cpuid_features().iter().all(|feature| wanted.contains(feature));
        if !is_wanted || inventory::is_excluded(&instruction) || instruction.encoding() == EncodingKind::D3NOW {
            continue;
        }
        let features: Vec<String> = instruction.cpuid_features().iter().map(|f| format!("{f:?}")).collect();
        let code = instruction.code();
        let entry = forms.entry(format!("{code:?}")).or_insert_with(|| (code, features.join(" "), Vec::new()));
        if entry.2.len() < ENCODINGS {
            entry.2.push(bytes);
        }
    }
    forms
}

fn fare(encodings: &[Vec<u8>], row: &mut Row, random: &mut Random, native: &mut Native) {
    for bytes in encodings {
        for _ in 0..ROUNDS {
            let mut before = compare::state(random, native);
            before.registers.general[RSI] = native.scratch() + 1024 + random.below(128) * 16;
            match compare::compare_from(before, random, native, bytes) {
                Compared::Not(reason) => row.reason = reason,
                Compared::Done(_, difference) => {
                    row.tried += 1;
                    row.agreed += usize::from(difference.is_none());
                    row.difference = row.difference.take().or(difference);
                }
            }
        }
    }
}

#[test]
fn test_forms_with_random_operands_agree_with_host() {
    let (mut random, mut native) = (Random(0xf0_4e5), Native::new());
    let mut rows = BTreeMap::new();
    for (name, (code, features, encodings)) in forms() {
        let mut row = Row { features, ..Row::default() };
        fare(&encodings, &mut row, &mut random, &mut native);
        let is_branch = decode(&encodings[0], 0).unwrap().flow_control() != FlowControl::Next;
        if row.tried == 0 && is_branch {
            row.reason = "it branches";
        }
        debug_assert!(!row.reason.is_empty() || row.tried > 0, "{code:?}");
        rows.insert(name, row);
    }
    let table = table(&rows);
    if let Some(path) = std::env::var_os("UHYVE_FORMS") {
        std::fs::write(path, &table).unwrap();
    }
    println!("{}", table.lines().take_while(|line| !line.starts_with("## Each")).collect::<Vec<_>>().join("\n"));
    let differences: Vec<_> = rows.values().filter_map(|row| row.difference.as_deref()).collect();
    assert!(differences.is_empty(), "{} forms differ:\n{}", differences.len(), differences.join("\n\n"));
    let compared = rows.values().filter(|row| row.tried > 0).count();
    assert!(compared * 10 >= rows.len() * 9, "{compared} of {} forms were compared", rows.len());
}

/// Totals by feature, then each form.
fn table(rows: &BTreeMap<String, Row>) -> String {
    let mut features: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
    for row in rows.values() {
        let sums = features.entry(&row.features).or_default();
        sums[0] += 1;
        sums[1] += usize::from(row.tried > 0);
        sums[2] += row.tried;
        sums[3] += row.agreed;
    }
    let mut text = String::from(
        "# Instruction forms against the host's CPU\n\nEach form of `x86/`, with random and boundary operands and state: \
         by the emulator and by the CPU of the machine that this was made on. Flags that the manuals leave undefined are \
         masked.\nWritten by `UHYVE_FORMS=$PWD/docs/instruction-forms.md cargo test --lib forms`. System instructions are \
         compared with KVM by `tests/rust/lockstep.rs`.\n\n| feature | forms | compared | tried | agreed |\n|---|--:|--:|--:|--:|\n",
    );
    let mut all = [0; 4];
    for (name, sums) in &features {
        let [forms, compared, tried, agreed] = sums;
        writeln!(text, "| {name} | {forms} | {compared} | {tried} | {agreed} |").unwrap();
        all.iter_mut().zip(sums).for_each(|(all, one)| *all += one);
    }
    let [forms, compared, tried, agreed] = all;
    writeln!(text, "| **all** | **{forms}** | **{compared}** | **{tried}** | **{agreed}** |").unwrap();
    text.push_str("\n## Not compared\n\n");
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, row) in rows.iter().filter(|(_, row)| row.tried == 0) {
        reasons.entry(row.reason).or_default().push(name);
    }
    for (reason, names) in reasons {
        writeln!(text, "- {reason} ({}): {}", names.len(), names.join(", ")).unwrap();
    }
    text.push_str("\n## Each form: tried, agreed\n\n");
    for (name, row) in rows.iter().filter(|(_, row)| row.tried > 0) {
        writeln!(text, "    {name:40} {:6} {:6}", row.tried, row.agreed).unwrap();
    }
    text
}
