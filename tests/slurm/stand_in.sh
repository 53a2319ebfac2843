#!/bin/bash
# Stands in for the roles of a run, to see how a job handles them: the controller counts steps in $STAND_IN/steps and
# saves when it is told to, the others wait for its end. What shall go wrong is a file in $STAND_IN:
#   kill-NAME      process NAME kills itself once
#   doom-NAME      process NAME ends with 1 every time
#   wrong          the controller ends with 2
role=$1
name=$role
while [ $# -gt 0 ]; do
    if [ "$1" = --name ]; then name=$2; fi
    if [ "$1" = --resume ]; then resumed=1; fi
    shift
done
cd "$STAND_IN" || exit 1
echo "$role" "${CUDA_VISIBLE_DEVICES-none}" "token ${#COSMOS_CONTROL_TOKEN}" > "seen-$name"
[ -e "doom-$name" ] && exit 1
case $role in
    controller)
        [ -e wrong ] && exit 2
        trap 'echo saved > end; exit 75' TERM USR1
        rm -f end
        address=${COSMOS_BROKER_URL##*@}
        password=${COSMOS_BROKER_URL#*://:}
        port=${address#*:}
        REDISCLI_AUTH=${password%%@*} redis-cli -h "${address%%:*}" -p "${port%%/*}" ping > broker-says 2>&1
        [ -n "$resumed" ] || echo 0 > steps
        while step=$(cat steps) && [ "$step" -lt "$STEPS" ]; do
            [ -e "kill-$name" ] && rm "kill-$name" && kill -9 $$
            sleep 0.5
            echo $((step + 1)) > steps
            echo $((step + 1)) >> history
        done
        echo done > end
        ;;
    *)
        # An old end must not be taken for a new one.
        sleep 2
        until [ -e end ]; do
            [ -e "kill-$name" ] && rm "kill-$name" && kill -9 $$
            sleep 0.3
        done
        [ "$(cat end)" = saved ] && exit 75
        ;;
esac
exit 0
