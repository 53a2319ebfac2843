;; Returns a sample error whose message is not UTF-8.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))

(func $score (param $samples i32) (param $count i32) (result i32)
  (if (i32.ge_s (call $guilty (local.get $samples) (local.get $count)) (i32.const 0))
    (then
      (i32.store (i32.const 2048) (i32.const 2064)) (i32.store (i32.const 2052) (i32.const 1))
      (i32.store8 (i32.const 2064) (i32.const 1))
      (i32.store (i32.const 2072) (i32.const 2100)) (i32.store (i32.const 2076) (i32.const 2))
      (i32.store16 (i32.const 2100) (i32.const 0xffff))
      (return (i32.const 2048))))
  (call $lengths (local.get $samples) (local.get $count)))
