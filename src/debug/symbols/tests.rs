use proptest::prelude::*;

use super::*;

const FUNC: u8 = 2;
const OBJECT: u8 = 1;
const NOTYPE: u8 = 0;
const TLS: u8 = 6;
const GLOBAL: u8 = 1 << 4;
const WEAK: u8 = 2 << 4;
const TEXT: u16 = 1;

/// A symbol as the test's ELF files hold it: name, `st_info`, section, value, size.
type Raw<'a> = (&'a str, u8, u16, u64, u64);

/// A minimal ELF file: `.text` at 0x1000–0x3000, `.symtab`, `.strtab`.
fn elf(symbols: &[Raw]) -> Vec<u8> {
    let mut strings = vec![0];
    let mut table = vec![0; 24];
    for (name, info, section, value, size) in symbols {
        table.extend(u32::try_from(strings.len()).expect("small").to_le_bytes());
        table.extend([*info, 0]);
        table.extend(section.to_le_bytes());
        table.extend(value.to_le_bytes());
        table.extend(size.to_le_bytes());
        strings.extend(name.as_bytes());
        strings.push(0);
    }
    let section = |kind: u32, address: u64, offset: usize, size: usize, link: u32, entry: u64| {
        let mut header = vec![0; 4];
        header.extend(kind.to_le_bytes());
        for word in [0, address, offset as u64, size as u64] {
            header.extend(word.to_le_bytes());
        }
        header.extend(link.to_le_bytes());
        header.extend([0; 4]);
        header.extend(8u64.to_le_bytes());
        header.extend(entry.to_le_bytes());
        header
    };
    let (at_table, at_strings) = (64, 64 + table.len());
    let headers = [
        section(0, 0, 0, 0, 0, 0),
        section(8, 0x1000, 0, 0x2000, 0, 0),
        section(2, 0, at_table, table.len(), 3, 24),
        section(3, 0, at_strings, strings.len(), 0, 0),
    ];
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    file.extend([3, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([0; 16]);
    file.extend(((at_strings + strings.len()) as u64).to_le_bytes());
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 0, 0, 64, 0, 4, 0, 3, 0]);
    assert_eq!(file.len(), 64);
    [file, table, strings, headers.concat()].concat()
}

const MAIN: &str = "_ZN11hello_world4main17h0123456789abcdefE";
const KERNEL_OPEN: &str = "libhermit__ZN6hermit2fs4open17h1111111111111111E";
const OTHER_OPEN: &str = "hermit__ZN6hermit3net4open17h2222222222222222E";
const TWIN: &str = "_ZN3app4twin17h3333333333333333E";
const OTHER_TWIN: &str = "_ZN3app4twin17h4444444444444444E";

fn sample() -> Vec<Raw<'static>> {
    vec![
        (MAIN, FUNC, TEXT, 0x1000, 0x20),
        ("alias", FUNC | WEAK, TEXT, 0x1000, 0x20),
        ("main", FUNC | GLOBAL, TEXT, 0x1040, 0x20),
        ("step_1", NOTYPE, TEXT, 0x1048, 0),
        (KERNEL_OPEN, FUNC, TEXT, 0x1100, 0x10),
        (OTHER_OPEN, FUNC, TEXT, 0x1200, 0x10),
        ("sys_open", FUNC | GLOBAL, TEXT, 0x1300, 0x40),
        ("memcpy", FUNC | GLOBAL, TEXT, 0x1400, 0x40),
        ("hermit_memcpy", FUNC | GLOBAL, TEXT, 0x1500, 0x40),
        ("hermit_strlen", FUNC | GLOBAL, TEXT, 0x1600, 0x40),
        (TWIN, FUNC, TEXT, 0x1700, 0x10),
        (OTHER_TWIN, FUNC, TEXT, 0x1710, 0x10),
        ("COUNTER", OBJECT | GLOBAL, TEXT, 0x2000, 8),
        ("thread_local", TLS, TEXT, 0x10, 8),
        ("", FUNC, TEXT, 0x1800, 8),
        ("undefined", FUNC | GLOBAL, 0, 0x1800, 8),
        ("section", 3, TEXT, 0x1000, 0),
        ("file.c", 4, 0xfff1, 0, 0),
        ("number", NOTYPE, 0xfff1, 0x1800, 0),
        ("_end", NOTYPE | GLOBAL, TEXT, 0x2ff0, 0),
    ]
}

fn table(symbols: &[Raw], bias: u64) -> SymbolTable {
    SymbolTable::from_elf(&Arc::from(elf(symbols)), bias)
}

fn one(table: &SymbolTable, name: &str) -> Symbol {
    match table.lookup(name) {
        Lookup::One(symbol) => symbol,
        other => panic!("{name}: {other:?}"),
    }
}

fn failure(table: &SymbolTable, expression: &str) -> String {
    match table.resolve(expression) {
        Err(Error::Breakpoint(text)) => text,
        other => panic!("{expression}: {other:?}"),
    }
}

#[test]
fn test_from_elf_takes_places_only() {
    let names: Vec<String> = table(&sample(), 0).iter().map(|symbol| symbol.name).collect();
    assert_eq!(names.len(), 14);
    for absent in ["thread_local", "", "undefined", "section", "file.c", "number"] {
        assert!(!names.iter().any(|name| name == absent), "{absent}");
    }
}

#[test]
fn test_lookup_each_spelling_of_a_name_finds_it() {
    let table = table(&sample(), 0x10_0000);
    for name in
        [MAIN, "hello_world::main", "hello_world::main::h0123456789abcdef", "main::h0123456789abcdef", " alias "]
    {
        assert_eq!(one(&table, name).address, 0x10_1000, "{name}");
    }
    for name in [KERNEL_OPEN, "hermit::fs::open", "fs::open", &KERNEL_OPEN["libhermit_".len()..]] {
        let symbol = one(&table, name);
        assert_eq!((symbol.address, symbol.name.as_str()), (0x10_1100, "hermit::fs::open"), "{name}");
    }
    assert_eq!(one(&table, "step_1").kind, SymbolKind::Label);
    assert_eq!(one(&table, "COUNTER").kind, SymbolKind::Data);
    assert_eq!(one(&table, "strlen").raw, "hermit_strlen");
}

#[test]
fn test_lookup_exact_name_beats_a_suffix_and_a_prefix() {
    let table = table(&sample(), 0);
    assert_eq!(one(&table, "main").address, 0x1040);
    assert_eq!(one(&table, "memcpy").address, 0x1400);
    assert_eq!(one(&table, "hermit_memcpy").address, 0x1500);
}

#[test]
fn test_lookup_several_addresses_are_ambiguous_and_aliases_are_one() {
    let table = table(&sample(), 0);
    let Lookup::Many(symbols) = table.lookup("open") else { panic!("ambiguous") };
    let names: Vec<_> = symbols.iter().map(|symbol| symbol.name.as_str()).collect();
    assert_eq!(names, ["hermit::fs::open", "hermit::net::open"]);
    assert!(matches!(table.lookup("app::twin"), Lookup::Many(symbols) if symbols.len() == 2));
    assert_eq!(one(&table, "twin::h4444444444444444").address, 0x1710);
    let text = failure(&table, "open");
    assert!(text.contains("'open' is ambiguous") && text.contains("0x1200 hermit::net::open (function)"), "{text}");
}

#[test]
fn test_lookup_generic_arguments_may_be_left_out() {
    let raw = "_ZN4core3ptr42drop_in_place$LT$alloc..string..String$GT$17h5555555555555555E";
    let method = "_ZN53_$LT$app..Server$u20$as$u20$core..ops..drop..Drop$GT$4drop17h6666666666666666E";
    let table = table(&[(raw, FUNC, TEXT, 0x1000, 4), (method, FUNC, TEXT, 0x1010, 4)], 0);
    for name in ["drop_in_place", "core::ptr::drop_in_place", "ptr::drop_in_place<alloc::string::String>"] {
        assert_eq!(one(&table, name).address, 0x1000, "{name}");
    }
    for name in ["drop", "<app::Server as core::ops::drop::Drop>::drop"] {
        assert_eq!(one(&table, name).address, 0x1010, "{name}");
    }
}

#[test]
fn test_lookup_unknown_name_suggests_near_ones() {
    let table = table(&sample(), 0);
    let Lookup::None { suggestions } = table.lookup("sys_opne") else { panic!("unknown") };
    assert_eq!(suggestions.first().map(String::as_str), Some("sys_open"));
    assert!(failure(&table, "sys_opne").contains("did you mean sys_open"));
    assert_eq!(failure(&table, "zzzzzzzz"), "no symbol 'zzzzzzzz'");
}

#[test]
fn test_symbolize_finds_the_nearest_that_contains_the_address() {
    let table = table(&sample(), 0x10_0000);
    let at = |address: u64| table.symbolize(address + 0x10_0000).map(|(symbol, offset)| (symbol.name, offset));
    assert_eq!(at(0x1000), Some(("alias".into(), 0)));
    assert_eq!(at(0x101f), Some(("alias".into(), 0x1f)));
    assert_eq!(at(0x1020), None);
    assert_eq!(at(0x1044), Some(("main".into(), 4)));
    assert_eq!(at(0x104a), Some(("step_1".into(), 2)));
    assert_eq!(at(0x1100), Some(("hermit::fs::open".into(), 0)));
    assert_eq!(at(0x2fff), Some(("_end".into(), 0xf)));
    assert_eq!(at(0x3000), None);
    assert_eq!(at(0xfff), None);
}

#[test]
fn test_symbolize_after_a_nested_symbol_gives_the_enclosing_one() {
    let symbols =
        [("outer", FUNC, TEXT, 0x1000, 0x100), ("inner", FUNC, TEXT, 0x1010, 0x10), ("other", FUNC, TEXT, 0x1010, 4)];
    let table = table(&symbols, 0);
    let at = |address| table.symbolize(address).map(|(symbol, offset)| (symbol.name, offset));
    assert_eq!(at(0x1018), Some(("inner".into(), 8)));
    assert_eq!(at(0x1020), Some(("outer".into(), 0x20)));
}

#[test]
fn test_symbolize_among_aliases_prefers_a_global_function() {
    let symbols = [
        ("label", NOTYPE | GLOBAL, TEXT, 0x1000, 0),
        ("local", FUNC, TEXT, 0x1000, 8),
        ("weak", FUNC | WEAK, TEXT, 0x1000, 8),
        ("global", FUNC | GLOBAL, TEXT, 0x1000, 8),
    ];
    let (symbol, _) = table(&symbols, 0).symbolize(0x1004).expect("known");
    assert_eq!(symbol.name, "global");
}

#[test]
fn test_resolve_every_form_of_a_location() {
    let table = table(&sample(), 0x10_0000);
    for (expression, address) in [
        ("sys_open", 0x10_1300),
        ("sys_open+0x10", 0x10_1310),
        (" sys_open + 16 ", 0x10_1310),
        ("sys_open-4", 0x10_12fc),
        ("hello_world::main+1", 0x10_1001),
        ("0x1234", 0x1234),
        ("1234", 1234),
        ("*0x1234", 0x1234),
        ("* 0xffff_8000_0000_0000", 0xffff_8000_0000_0000),
        ("*0x1000+8", 0x1008),
    ] {
        assert_eq!(table.resolve(expression).expect(expression), address, "{expression}");
    }
}

#[test]
fn test_resolve_what_is_no_location_says_why() {
    let table = table(&sample(), 0);
    assert!(failure(&table, " ").contains("a location is needed"));
    assert!(failure(&table, "*").contains("a location is needed"));
    assert!(failure(&table, "sys_open-0xffffffff").contains("outside of 64 bits"));
    assert!(failure(&table, "sys_opne+4").contains("did you mean sys_open"));
    assert!(failure(&table, "open+4").contains("ambiguous"));
    assert!(failure(&table, "*nonsense").contains("write *0x1234"));
    assert!(failure(&table, &"x".repeat(100_000)).len() < 1000);
    assert!(failure(&table, "0x1_0000_0000_0000_0000").contains("no symbol"));
}

#[test]
fn test_resolve_many_candidates_lists_some() {
    let raw: Vec<String> = (0..30).map(|i| format!("_ZN3m{i:02}4same17h{i:016x}E")).collect();
    let symbols: Vec<Raw> =
        (0u64..).zip(&raw).map(|(i, name)| (name.as_str(), FUNC, TEXT, 0x1000 + i * 16, 16)).collect();
    let text = failure(&table(&symbols, 0), "same");
    assert!(text.contains("30 addresses") && text.contains("and 20 more"), "{text}");
}

#[test]
fn test_matching_is_bounded_and_counts_all() {
    let table = table(&sample(), 0);
    let matches = table.matching("*open*", 2);
    assert_eq!((matches.symbols.len(), matches.total), (2, 3));
    assert_eq!(table.matching("step_?", 9).total, 1);
    assert_eq!(table.matching("hermit::*", 9).total, 2);
    assert_eq!(table.matching("ain", 9).total, 0);
}

#[test]
fn test_from_elf_stripped_or_broken_image_is_empty_and_errors_say_so() {
    for image in [vec![], vec![0; 64], elf(&[]), b"\x7fELF".to_vec()] {
        let table = SymbolTable::from_elf(&Arc::from(image), 0);
        assert!(table.is_empty());
        assert_eq!(table.symbolize(0x1000), None);
        assert!(failure(&table, "main").contains("the image has no symbols"));
        assert_eq!(table.resolve("*0x10").expect("a number"), 16);
    }
}

#[test]
fn test_from_elf_name_without_an_end_is_left_out() {
    let long = "a".repeat(3000);
    let mut image = elf(&[(&long, FUNC, TEXT, 0x1000, 1)]);
    let strings = image.windows(3).position(|window| window == b"aaa").expect("the name");
    let table = SymbolTable::from_elf(&Arc::from(image.clone()), 0);
    assert_eq!(one(&table, &long).address, 0x1000);
    // A name that never ends is no name.
    let end = strings + long.len();
    image[end] = b'a';
    let table = SymbolTable::from_elf(&Arc::from(image), 0);
    assert!(table.is_empty());
}

#[test]
fn test_from_elf_overlapping_names_are_bounded() {
    let long = "a".repeat(3000);
    let mut symbols: Vec<Raw> = vec![(&long, FUNC, TEXT, 0x1000, 1)];
    symbols.extend((0..999).map(|i| ("", FUNC, TEXT, 0x1001 + i, 1)));
    let mut image = elf(&symbols);
    for index in 1..=1000 {
        image[64 + index * 24..][..4].copy_from_slice(&1u32.to_le_bytes());
    }
    let table = SymbolTable::from_elf(&Arc::from(image), 0);
    assert!((4..=6).contains(&table.len()), "{}", table.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn test_from_elf_damaged_image_never_panics(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        bias: u64,
        address: u64,
    ) {
        let mut image = elf(&sample());
        for (at, byte) in &damage {
            let at = at.index(image.len());
            image[at] = *byte;
        }
        if damage.len() == 7 {
            image.truncate(cut.index(image.len()));
        }
        let table = SymbolTable::from_elf(&Arc::from(image), bias);
        for symbol in table.iter() {
            let _ = table.symbolize(symbol.address);
            let _ = table.resolve(&symbol.name);
        }
        let _ = table.symbolize(address);
        let _ = table.resolve("main+0x10");
        let _ = table.matching("*m*", 3);
    }

    #[test]
    fn test_resolve_any_text_never_panics(text in "\\PC{0,40}|[a-z:<>+*-]{0,20}", pattern in "[a*?é]{0,8}") {
        let table = table(&sample(), 0);
        let _ = table.resolve(&text);
        let _ = table.matching(&pattern, 1);
        let _ = table.matching(&text, 1);
    }
}
