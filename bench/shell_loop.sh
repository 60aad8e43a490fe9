#!/bin/bash
# Onboards devices as people do by hand, for some seconds; bench/compare starts it, as a racer of harness.race:
#
#   bench/shell_loop.sh SECONDS FOLDER
#
# a key with its request (openssl req), a certificate (openssl ca, with its index and its serial numbers), an ACL entry,
# an encrypted archive (7z). Nothing is synced to the disk, checked, logged or delivered.
set -euo pipefail
case ${1:-} in
    -h | --help)
        sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
        exit 0
        ;;
esac
if [ $# != 2 ]; then
    echo "It takes SECONDS and FOLDER; with --help it says what it does." >&2
    exit 1
fi
seconds=$1
folder=$2 # a CA of its own for each worker: the index of openssl ca cannot be shared by two processes
mkdir -p "$folder/certs" && cd "$folder"
export DEVICE=none
trap 'cat errors >&2' ERR

cat > openssl.cnf <<'END'
[ca]
default_ca = issuing
[issuing]
dir = .
database = index.txt
serial = serial
new_certs_dir = certs
certificate = ca.pem
private_key = ca.key
default_md = sha256
default_days = 365
unique_subject = no
policy = policy
x509_extensions = device
[policy]
commonName = supplied
[req]
distinguished_name = name
x509_extensions = authority
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[device]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
subjectAltName = URI:urn:uuid:${ENV::DEVICE}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout ca.key -out ca.pem \
    -subj /CN=loop -days 3650 -config openssl.cnf 2>> errors
: > index.txt
: > acl
echo 1000 > serial

echo ready
read -r _
microseconds() { echo "${EPOCHREALTIME/./}"; }
times=
started=$(microseconds)
now=$started
until_=$((started + ${seconds%.*} * 1000000))
while ((now < until_)); do
    before=$now
    read -r DEVICE < /proc/sys/kernel/random/uuid
    read -r password < /proc/sys/kernel/random/uuid
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout "$DEVICE.key" -out "$DEVICE.csr" \
        -subj "/CN=$DEVICE" -config openssl.cnf 2>> errors
    openssl ca -batch -notext -in "$DEVICE.csr" -out "$DEVICE.pem" -config openssl.cnf 2>> errors
    printf 'user %s\ntopic readwrite devices/%s/#\n' "$DEVICE" "$DEVICE" >> acl
    7z a -tzip -mem=AES256 "-p$password" "$DEVICE.zip" "$DEVICE.key" "$DEVICE.pem" ca.pem > /dev/null
    rm "$DEVICE.key" "$DEVICE.csr"
    now=$(microseconds)
    times+=",$(((now - before) / 1000))"
done
elapsed=$((now - started))
printf '{"seconds": %d.%06d, "times": [%s], "cpu": 0}\n' $((elapsed / 1000000)) $((elapsed % 1000000)) "${times#,}"
