;; A guest with the C library's imports (WASI preview 1 through the adapter). By the first byte of the first completion:
;; `z` sleeps for an hour; `p` asks the clock again and again without waiting; `q` waits for standard input, `y` yields,
;; both for ever; `e` scores the number of environment variables; `c` the wall clock in units of 10,000 s;
;; `m` the monotonic clock; `r` a random number; `d` the error of the first preopened directory;
;; `w` writes to standard error and panics; `x` ends the process.
(import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "sched_yield" (func $yield (result i32)))
(import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "clock_time_get" (func $time (param i32 i64 i32) (result i32)))
(import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(data (i32.const 2048) "Traceback:\0a  it broke\0a")
(func $value (param $what i32) (result f64)
  (if (i32.eq (local.get $what) (i32.const 122)) (then
    (memory.fill (i32.const 3000) (i32.const 0) (i32.const 48))
    (i32.store offset=16 (i32.const 3000) (i32.const 1))
    (i64.store offset=24 (i32.const 3000) (i64.const 3600000000000))
    (drop (call $poll (i32.const 3000) (i32.const 3100) (i32.const 1) (i32.const 3200)))))
  (if (i32.eq (local.get $what) (i32.const 112)) (then
    (memory.fill (i32.const 3000) (i32.const 0) (i32.const 48))
    (i32.store offset=16 (i32.const 3000) (i32.const 1))
    (loop $forever (drop (call $poll (i32.const 3000) (i32.const 3100) (i32.const 1) (i32.const 3200))) (br $forever))))
  (if (i32.eq (local.get $what) (i32.const 113)) (then
    (i32.store (i32.const 3000) (i32.const 3300)) (i32.store (i32.const 3004) (i32.const 64))
    (loop $forever (drop (call $read (i32.const 0) (i32.const 3000) (i32.const 1) (i32.const 3100))) (br $forever))))
  (if (i32.eq (local.get $what) (i32.const 121)) (then
    (loop $forever (drop (call $yield)) (br $forever))))
  (if (i32.eq (local.get $what) (i32.const 101)) (then
    (drop (call $environ (i32.const 3000) (i32.const 3004)))
    (return (f64.convert_i32_u (i32.load (i32.const 3000))))))
  (if (i32.eq (local.get $what) (i32.const 99)) (then
    (drop (call $time (i32.const 0) (i64.const 1) (i32.const 3000)))
    (return (f64.convert_i64_u (i64.div_u (i64.load (i32.const 3000)) (i64.const 10000000000000))))))
  (if (i32.eq (local.get $what) (i32.const 109)) (then
    (drop (call $time (i32.const 1) (i64.const 1) (i32.const 3000)))
    (return (f64.convert_i64_u (i64.load (i32.const 3000))))))
  (if (i32.eq (local.get $what) (i32.const 114)) (then
    (drop (call $random (i32.const 3000) (i32.const 2)))
    (return (f64.convert_i32_u (i32.load16_u (i32.const 3000))))))
  (if (i32.eq (local.get $what) (i32.const 100)) (then
    (return (f64.convert_i32_u (call $prestat (i32.const 3) (i32.const 3000))))))
  (if (i32.eq (local.get $what) (i32.const 119)) (then
    (i32.store (i32.const 3000) (i32.const 2048)) (i32.store (i32.const 3004) (i32.const 22))
    (drop (call $write (i32.const 2) (i32.const 3000) (i32.const 1) (i32.const 3100)))
    unreachable))
  (if (i32.eq (local.get $what) (i32.const 120)) (then (call $exit (i32.const 7))))
  (f64.const -1))
(func $score (param $samples i32) (param $count i32) (result i32)
  (local $list i32)
  (local.set $list (call $lengths (local.get $samples) (local.get $count)))
  (call $set (local.get $list) (i32.const 0) (call $value (call $first (local.get $samples) (i32.const 0))))
  (local.get $list))
