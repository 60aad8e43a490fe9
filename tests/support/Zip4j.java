import net.lingala.zip4j.ZipFile;

/** Extracts an archive (first argument) into a folder (second) with the password in the variable BUNDLE_PASSWORD. */
public class Zip4j {
    public static void main(String[] files) throws Exception {
        try (ZipFile archive = new ZipFile(files[0], System.getenv("BUNDLE_PASSWORD").toCharArray())) {
            archive.extractAll(files[1]);
        }
    }
}
