;; Calls itself without end.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(func $deeper (param i32) (result i32) (i32.add (i32.const 1) (call $deeper (i32.add (local.get 0) (i32.const 1)))))
(func $score (param $samples i32) (param $count i32) (result i32)
  (if (i32.ge_s (call $guilty (local.get $samples) (local.get $count)) (i32.const 0))
    (then
      (drop (call $deeper (i32.const 0)))))
  (call $lengths (local.get $samples) (local.get $count)))
