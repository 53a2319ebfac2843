;; Needs the grant `log`. Calls the host without end when a completion starts with `!`.
(import "cosmos:plugin/log@0.1.0" "write" (func $write (param i32 i32 i32)))
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(data (i32.const 2048) "again")
(func $score (param $samples i32) (param $count i32) (result i32)
  (if (i32.ge_s (call $guilty (local.get $samples) (local.get $count)) (i32.const 0))
    (then (loop $forever (call $write (i32.const 2) (i32.const 2048) (i32.const 5)) (br $forever))))
  (call $lengths (local.get $samples) (local.get $count)))
