use super::*;

const CLEAN: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'count_rows_a571edb8' for 'sm_90a'
ptxas info    : Function properties for count_rows_a571edb8
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
ptxas info    : Compile time = 6.992 ms
";

const SPILLING: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'block_sparse_forward_f_bf16_n_4_v_4_1223cc37' for 'sm_80'
ptxas info    : Function properties for block_sparse_forward_f_bf16_n_4_v_4_1223cc37
    40 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 40 bytes cumulative stack size, 520 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 65.420 ms
";

const SERIALIZED: &str = "\
ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions defining input registers of a wgmma between start and end of the pipeline stage in the function 'block_sparse_forward_wgmma_f_bf16_d7d784e7'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'block_sparse_forward_wgmma_f_bf16_d7d784e7' for 'sm_90a'
ptxas info    : Function properties for block_sparse_forward_wgmma_f_bf16_d7d784e7
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compile time = 218.883 ms
";

fn report(kernel: &str, log: &str) -> Report {
    Report::parse(kernel, "", log).expect("a complete log")
}

#[test]
fn a_clean_kernel_has_no_fault() {
    let report = report("count_rows_a571edb8", CLEAN);
    assert_eq!(
        (report.registers, report.spill_stores, report.spill_loads),
        (16, 0, 0)
    );
    assert_eq!(report.fault(), None);
}

#[test]
fn spills_are_counted_and_refused() {
    let report = report("block_sparse_forward_f_bf16_n_4_v_4_1223cc37", SPILLING);
    assert_eq!(
        (report.registers, report.spill_stores, report.spill_loads),
        (80, 40, 44)
    );
    // Of 40 bytes, all given up for occupancy, or more than half for want of registers.
    assert_eq!(report.fault(), None);
    let forced = Report {
        forced_stores: 24,
        ..report.clone()
    };
    let fault = forced.fault().unwrap();
    assert!(fault.contains("24 bytes with all registers"), "{fault}");
    let traded = Report {
        spill_stores: 68,
        ..report
    };
    let fault = traded.fault().unwrap();
    assert!(
        fault.contains("68 bytes for occupancy, of at most 64"),
        "{fault}"
    );
}

#[test]
fn all_registers_are_as_many_as_the_threads_can_have() {
    let bound = |threads: u32| {
        let ptx = format!(".entry k()\n.maxntid {threads}, 1, 1\n{{ }}");
        with_all_registers(&ptx).unwrap()
    };
    assert_eq!(bound(128), ".entry k()\n.maxnreg 255\n{ }");
    assert!(bound(256).contains(".maxnreg 255") && bound(512).contains(".maxnreg 128"));
    assert_eq!(with_all_registers(".entry k()"), None);
}

#[test]
fn only_portable_engines_may_spill_a_little() {
    let log = SPILLING.replace("40 bytes spill", "16 bytes spill");
    assert_eq!(
        report("block_sparse_forward_f_f32_n_4_v_4_b90b38b6", &log).fault(),
        None
    );
    assert!(
        report("block_sparse_forward_wgmma_f_bf16_d7d784e7", &log)
            .fault()
            .is_some()
    );
}

#[test]
fn serialized_matrix_instructions_are_a_fault() {
    let report = report("block_sparse_forward_wgmma_f_bf16_d7d784e7", SERIALIZED);
    assert_eq!(report.registers, 168);
    assert!(report.fault().unwrap().contains("serialized"));
}

#[test]
fn a_log_without_figures_is_no_report() {
    let log = "ptxas fatal   : Ptx assembly aborted due to errors\n";
    assert_eq!(Report::parse("kernel", "", log), None);
}

#[test]
fn warpgroups_must_not_wait_for_registers_that_nobody_gives_up() {
    let ptx = ".maxntid 384, 1, 1 setmaxnreg.dec.sync.aligned.u32 24; \
               setmaxnreg.inc.sync.aligned.u32 216;";
    let fault = |registers: &str| {
        let log = SERIALIZED.replace("168 registers", registers);
        let log = log.replace("serialized", "");
        Report::parse("sla_forward_wgmma", ptx, &log)
            .unwrap()
            .fault()
    };
    assert_eq!(fault("168 registers"), None);
    assert_eq!(fault("152 registers"), None);
    assert!(fault("151 registers").unwrap().contains("would hang"));
}
