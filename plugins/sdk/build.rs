//! Records the compiler and the target, so that a host can name them when it refuses a plugin.

fn main() {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let version = std::process::Command::new(rustc).arg("--version").output();
    let version = version.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    println!("cargo::rustc-env=HOMEROOM_RUSTC={}", version.unwrap_or_else(|_| "unknown".to_owned()));
    println!("cargo::rustc-env=HOMEROOM_TARGET={}", std::env::var("TARGET").unwrap_or_else(|_| "unknown".to_owned()));
    println!("cargo::rerun-if-changed=build.rs");
}
