;; Never leaves `init`.
(func $init (param i32 i32 i32 i32) (result i32) (loop $forever (br $forever)) (unreachable))
(func $score (param $samples i32) (param $count i32) (result i32) (call $lengths (local.get 0) (local.get 1)))
