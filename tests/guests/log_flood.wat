;; Needs the grant `log`. A completion that starts with `!` logs a line and panics; any other logs 10,000 lines.
(import "cosmos:plugin/log@0.1.0" "write" (func $write (param i32 i32 i32)))
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(data (i32.const 2048) "all is\0alost\1b[31m")
(func $score (param $samples i32) (param $count i32) (result i32)
  (local $line i32)
  (if (i32.ge_s (call $guilty (local.get $samples) (local.get $count)) (i32.const 0))
    (then (call $write (i32.const 4) (i32.const 2048) (i32.const 16)) unreachable))
  (loop $next
    (call $write (i32.const 2) (i32.const 2048) (i32.const 16))
    (local.set $line (i32.add (local.get $line) (i32.const 1)))
    (br_if $next (i32.lt_u (local.get $line) (i32.const 10000))))
  (call $lengths (local.get $samples) (local.get $count)))
