;; Tries the network: a completion that starts with `c` connects over TCP to 127.0.0.1 at the port in its second and
;; third byte (little-endian), `b` binds a TCP socket, `u` binds a UDP socket, `n` looks a name up. The score is 100 plus
;; the error of making the socket, or 200 plus the error of using it, or 999.
(import "wasi:sockets/instance-network@0.2.0" "instance-network" (func $network (result i32)))
(import "wasi:sockets/tcp-create-socket@0.2.0" "create-tcp-socket" (func $tcp (param i32 i32)))
(import "wasi:sockets/tcp@0.2.0" "[method]tcp-socket.start-connect"
  (func $connect (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32)))
(import "wasi:sockets/tcp@0.2.0" "[method]tcp-socket.start-bind"
  (func $bind (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32)))
(import "wasi:sockets/udp-create-socket@0.2.0" "create-udp-socket" (func $udp (param i32 i32)))
(import "wasi:sockets/udp@0.2.0" "[method]udp-socket.start-bind"
  (func $bind_udp (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32)))
(import "wasi:sockets/ip-name-lookup@0.2.0" "resolve-addresses" (func $resolve (param i32 i32 i32 i32)))
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(data (i32.const 2048) "localhost")
;; The verdict on the result at 3000, of which `$base` is the stage; -1 when it is good.
(func $error (param $base i32) (result i32)
  (if (result i32) (i32.load8_u (i32.const 3000))
    (then (i32.add (local.get $base) (i32.load8_u offset=4 (i32.const 3000))))
    (else (i32.const -1))))
;; A result without a value keeps its error right behind the tag.
(func $used (result i32)
  (if (result i32) (i32.load8_u (i32.const 3000))
    (then (i32.add (i32.const 200) (i32.load8_u offset=1 (i32.const 3000))))
    (else (i32.const 999))))
(func $try (param $what i32) (param $port i32) (result i32)
  (local $net i32) (local $socket i32) (local $error i32)
  (local.set $net (call $network))
  (if (i32.eq (local.get $what) (i32.const 110)) (then
    (call $resolve (local.get $net) (i32.const 2048) (i32.const 9) (i32.const 3000))
    (local.set $error (call $error (i32.const 200)))
    (return (select (i32.const 999) (local.get $error) (i32.eq (local.get $error) (i32.const -1))))))
  (if (i32.eq (local.get $what) (i32.const 117))
    (then (call $udp (i32.const 0) (i32.const 3000)))
    (else (call $tcp (i32.const 0) (i32.const 3000))))
  (local.set $error (call $error (i32.const 100)))
  (if (i32.ne (local.get $error) (i32.const -1)) (then (return (local.get $error))))
  (local.set $socket (i32.load offset=4 (i32.const 3000)))
  (if (i32.eq (local.get $what) (i32.const 99)) (then
    (call $connect (local.get $socket) (local.get $net) (i32.const 0) (local.get $port)
      (i32.const 127) (i32.const 0) (i32.const 0) (i32.const 1)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 3000))))
  (if (i32.eq (local.get $what) (i32.const 98)) (then
    (call $bind (local.get $socket) (local.get $net) (i32.const 0) (i32.const 0)
      (i32.const 127) (i32.const 0) (i32.const 0) (i32.const 1)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 3000))))
  (if (i32.eq (local.get $what) (i32.const 117)) (then
    (call $bind_udp (local.get $socket) (local.get $net) (i32.const 0) (i32.const 0)
      (i32.const 127) (i32.const 0) (i32.const 0) (i32.const 1)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 3000))))
  (call $used))
(func $score (param $samples i32) (param $count i32) (result i32)
  (local $list i32)
  (local.set $list (call $lengths (local.get $samples) (local.get $count)))
  (call $set (local.get $list) (i32.const 0) (f64.convert_i32_u (call $try
    (call $first (local.get $samples) (i32.const 0))
    (i32.load16_u offset=1 (i32.load offset=8 (local.get $samples))))))
  (local.get $list))
